"""A small generated shop: planted tastes, texts, images and habits, so that it is known what a model can find.

Items are an object (what they are: it shows in the text) in a style (how they look: it shows in the image). Users have
a taste for one or two styles, and go from object to object along planted habits (from a mug to a certain other object).
Among the items of that object and style they take the popular ones more often. Popularity alone therefore says little,
sequences say much, and content tells what rarely taken items have in common with others.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from bbqrec.data.dataset import Dataset, Features, Histories

ROOMS = {  # objects
    "kitchen": ("mug", "teapot", "bowl", "tray"),
    "reading": ("bookend", "desk lamp", "notebook", "pen stand"),
    "garden": ("planter", "watering can", "garden stool", "lantern"),
    "bath": ("soap dish", "towel rack", "bath mat", "mirror"),
    "hall": ("coat hook", "umbrella stand", "bench", "doormat"),
    "kids": ("toy box", "night light", "picture frame", "step stool"),
}
STYLES = {  # adjectives, materials
    "rustic": (("rustic", "weathered", "farmhouse", "handmade"), ("oak", "jute", "clay", "wicker")),
    "modern": (("modern", "slim", "minimal", "geometric"), ("steel", "glass", "concrete", "acrylic")),
    "playful": (("colourful", "striped", "dotted", "cheerful"), ("felt", "rubber", "cork", "enamel")),
    "classic": (("classic", "carved", "antique", "elegant"), ("brass", "marble", "walnut", "porcelain")),
    "coastal": (("coastal", "bleached", "breezy", "nautical"), ("driftwood", "rope", "linen", "bamboo")),
}

WIDTH = 64  # of both features
NO_IMAGE = 0.04  # share of items


def make_demo_dataset(n_users: int = 3000, n_items: int = 1000, seed: int = 0) -> Dataset:
    """Generates the shop; the same arguments give the same data set.

    Features are "text" (what an item is, and its material) and "image" (how it looks; a few items have none). Every
    user has 5 to 20 interactions, no item twice.

    Raises `ValueError` if there is no user, or if there are fewer than 40 items.
    """
    if n_users < 1:
        raise ValueError(f"n_users: got {n_users}, expected at least 1")
    if n_items < 40:
        raise ValueError(f"n_items: got {n_items}, expected at least 40 (a user takes up to 20 different ones)")
    rng = np.random.default_rng(seed)
    catalogue = _make_catalogue(n_items, rng)
    return Dataset(
        name="demo",
        item_ids=[f"item-{i:04}" for i in range(n_items)],
        user_ids=[f"user-{u:04}" for u in range(n_users)],
        histories=_make_histories(n_users, catalogue, rng),
        features=_make_features(catalogue, rng),
        texts={"title": catalogue.titles, "details": catalogue.details},
    )


@dataclass(frozen=True)
class _Catalogue:
    """`(n_items,)` arrays of indices: which object, style, adjective and material each item is."""

    objects: np.ndarray
    styles: np.ndarray
    adjectives: np.ndarray
    materials: np.ndarray
    titles: list[str]
    details: list[str]


def _make_catalogue(n_items: int, rng: np.random.Generator) -> _Catalogue:
    names = [(room, thing) for room, things in ROOMS.items() for thing in things]
    styles = list(STYLES)
    # objects and styles in turn, so that all their combinations have equally many items, and in random order
    turn = rng.permutation(n_items)
    objects, style = turn % len(names), turn // len(names) % len(styles)
    adjectives, materials = rng.integers(4, size=(2, n_items))
    titles, details, seen = [], [], Counter()
    for i in range(n_items):
        room, thing = names[objects[i]]
        words = STYLES[styles[style[i]]]
        title = f"{words[0][adjectives[i]]} {words[1][materials[i]]} {thing}".capitalize()
        seen[title] += 1
        titles.append(title if seen[title] == 1 else f"{title} no. {seen[title]}")
        details.append(f"For the {room}, in {styles[style[i]]} style")
    return _Catalogue(objects, style, 4 * style + adjectives, 4 * style + materials, titles, details)


def _make_histories(n_users: int, catalogue: _Catalogue, rng: np.random.Generator) -> Histories:
    """Walks: the next item is as likely as popularity x habit after the last object x taste of the user in styles."""
    n_items, n_objects, n_styles = len(catalogue.titles), sum(map(len, ROOMS.values())), len(STYLES)
    popularity = rng.permutation(np.arange(1, n_items + 1) ** -0.7)
    habit = np.full((n_objects, n_objects), 0.01)
    for row in habit:
        row[rng.choice(n_objects, 3, replace=False)] = (0.6, 0.3, 0.15)
    taste = np.full((n_users, n_styles), 0.03)
    first, second = rng.permuted(np.tile(np.arange(n_styles), (n_users, 1)), axis=1)[:, :2].T
    taste[np.arange(n_users), first] = 0.7
    taste[np.arange(n_users), second] = 0.25

    lengths = 5 + rng.binomial(15, rng.beta(1.2, 4.0, n_users))
    liked = (popularity * taste[:, catalogue.styles]).astype(np.float32)  # (n_users, n_items)
    taken = np.full((n_users, lengths.max()), -1)
    for step in range(lengths.max()):
        users = np.flatnonzero(lengths > step)
        weights = liked[users]
        if step:
            weights *= habit[catalogue.objects[taken[users, step - 1]]][:, catalogue.objects]
        # the largest of weight / exponential draws items in proportion to their weights
        draws = np.maximum(rng.standard_exponential(weights.shape, np.float32), 1e-30)
        taken[users, step] = (weights / draws).argmax(1)
        liked[users, taken[users, step]] = 0  # no item twice
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int64)
    return Histories(taken[taken >= 0].astype(np.int64), offsets)


def _make_features(catalogue: _Catalogue, rng: np.random.Generator) -> dict[str, Features]:
    """Sums of one random vector for each word (text) or trait that can be seen (image), with noise."""

    def embed(*traits: tuple[np.ndarray, float], noise: float) -> np.ndarray:
        total = noise * rng.standard_normal((len(catalogue.titles), WIDTH))
        for indices, weight in traits:
            total += weight * rng.standard_normal((indices.max() + 1, WIDTH))[indices]
        return total.astype(np.float32)

    c = catalogue
    text = embed((c.objects, 1.0), (c.adjectives, 0.5), (c.materials, 0.5), noise=0.3)
    image = embed((c.styles, 1.0), (c.materials, 0.5), (c.objects, 0.5), noise=0.5)
    everyone = np.ones(len(text), bool)
    seen = rng.random(len(image)) >= NO_IMAGE
    return {"text": Features(text, everyone), "image": Features(np.where(seen[:, None], image, 0), seen)}
