"""MovieLens 1M and 10M, as unpacked.

    ratings.dat    UserID::MovieID::Rating::Timestamp; every rating counts as an interaction, whatever its stars
    movies.dat     optional: MovieID::Title::Genre|Genre|...

Items are the rated movies, in the order of `movies.dat`, or of appearance without it: 3,706 of the 3,883 movies of
MovieLens-1M. Files are in UTF-8, otherwise in Latin-1. Other files are not read.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bbqrec.data.dataset import Dataset, Histories, check_unique
from bbqrec.data.formats.tables import encode, read_separated

LAYOUT = "ratings.dat (MovieLens)"


def detect(folder: Path) -> bool:
    return (folder / "ratings.dat").is_file()


def read(folder: Path) -> Dataset:
    """Reads the format of this module. Raises `ValueError` naming the file and the line of the first fault."""
    columns = ("user", "item", "rating", "timestamp")
    used = ("user", "item", "timestamp")
    ratings = read_separated(folder / "ratings.dat", "::", columns, used).with_ids(*used)
    users, user_ids = encode(ratings["user"])
    movies_path = folder / "movies.dat"
    if movies_path.is_file():
        movies = read_separated(movies_path, "::", ("item", "title", "genres")).with_ids("item")
        movie_ids = movies["item"].to_list()
        check_unique(movie_ids, str(movies_path))
        rated, items = np.unique(ratings.listed("item", movie_ids, movies_path.name), return_inverse=True)
        item_ids = [movie_ids[i] for i in rated]
        texts = {
            "title": movies["title"].gather(rated).to_list(),
            "genres": movies["genres"].gather(rated).str.replace_all("|", ", ", literal=True).to_list(),
        }
    else:
        (items, item_ids), texts = encode(ratings["item"]), {}
    return Dataset(
        name=folder.resolve().name,
        item_ids=item_ids,
        user_ids=user_ids,
        histories=Histories.from_interactions(users, items, ratings.timestamps("timestamp"), len(user_ids)),
        texts=texts,
        path=folder,
    )
