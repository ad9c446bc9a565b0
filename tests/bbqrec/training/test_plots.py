"""Pictures of a run show its logs and its codes."""

import numpy as np
import pytest
from PIL import Image

from bbqrec.training import plots


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved, which are saved all the same."""
    figures, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def assert_is_a_picture(path):
    pixels = np.asarray(Image.open(path).convert("L"))
    assert min(pixels.shape) > 300
    assert 0.5 < (pixels == 255).mean() < 0.99  # lines and letters on white


def test_curves_are_the_columns_of_the_logs(bbqrec_run, drawn, tmp_path):
    logs = bbqrec_run.folder / "logs"
    plots.save_curves(tmp_path / "curves.png", logs)
    assert_is_a_picture(tmp_path / "curves.png")
    shown = {}
    for axes in drawn[0].axes:
        stage, what = axes.get_title().split(": ")
        prefix = {"training loss": "train/", "validation": "validation/"}[what]
        for line in axes.lines:
            shown[stage.replace(" ", "_"), prefix + line.get_label()] = line.get_xydata()
        assert [text.get_text() for text in axes.get_legend().texts] == [line.get_label() for line in axes.lines]
    logged = {stage: plots.read_log(logs / stage) for stage in plots.STAGES}
    assert shown.keys() == {
        (stage, name) for stage, log in logged.items() for name in log.columns if name not in ("epoch", "step")
    }
    for (stage, name), points in shown.items():
        expected = logged[stage].select(epoch=logged[stage]["epoch"] + 1, value=name)
        np.testing.assert_array_equal(points, expected.to_numpy())


def test_use_of_codebooks_is_counted_by_level_and_modality(bbqrec_run, drawn, tmp_path):
    ids = bbqrec_run.semantic_ids
    plots.save_codebook_usage(tmp_path / "codebooks.png", ids)
    assert_is_a_picture(tmp_path / "codebooks.png")
    panels = drawn[0].axes
    assert len(panels) == ids.codes.shape[2]
    for level, axes in enumerate(panels):
        assert axes.get_title().startswith(f"level {level}: ")
        for modality, line in zip(range(len(ids.modalities)), axes.lines, strict=True):
            codes = ids.codes[:, modality, level]
            counts = sorted((int((codes == code).sum()) for code in range(ids.codebook_size)), reverse=True)
            assert line.get_ydata().tolist() == counts
            assert line.get_label() == ids.modalities[modality]
