"""A run on data whose names are hostile: as HTML, as attributes, as CSS, as a script."""

from dataclasses import replace

import pytest

from bbqrec import fit

HOSTILE = [
    "<script>document.title = 'stolen'</script>",
    '"><img src=x onerror="document.title = \'stolen\'">',
    "' onmouseover='alert(1)",
    "</title></style></svg></script><script>alert(1)</script>",
    "&lt;b&gt; &amp;amp; &#60;",
    "<!-- never closed",
    "مرحبا \u202e right to left",
    "a long name without a space: " + "x" * 300,
    "]]> {{7*7}} ${7*7} `back` \\u003cscript\\u003e",
]


@pytest.fixture(scope="session")
def hostile_titles():
    return HOSTILE


@pytest.fixture(scope="session")
def hostile_run(tiny_data, tiny_config, tmp_path_factory):
    n_items = tiny_data.n_items
    titles = [f"{HOSTILE[i % len(HOSTILE)]} {i}" for i in range(n_items)]
    data = replace(
        tiny_data,
        name="<i>shop</i> & \"sons'" + 60 * "y",
        path=None,
        item_ids=[f"<b id='{i}'>" for i in range(n_items)],
        user_ids=[f"</h3><script>{u}</script>{60 * 'u'}" for u in range(tiny_data.n_users)],
        texts={"title": titles},
        features={"</td><u>text</u>": tiny_data.features["text"], "im\"age'" + 60 * "z": tiny_data.features["image"]},
    )
    config = tiny_config.override({"tokenizer.epochs": 1, "training.epochs": 2})
    return fit(data, tmp_path_factory.mktemp("hostile") / "run", config=config, progress=False)
