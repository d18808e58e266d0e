"""An index's vectors in a Qdrant database, searched there in the place of the index's own ranking."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from machine.errors import InputError, first_line

PATIENCE = 30                           # seconds, for the answer to one question


class Qdrant:
    """A collection that holds what `search.py export --vectors` wrote, asked as FAISS's rankings are: each vector is
    compared with a query, in float32.

    where: http(s)://HOST:PORT, or a folder of its client's local mode. dim, model: size of the vectors, and the
    fingerprint of the model that made them. changes: of the list, when they were exported. Raises InputError where
    they are not to be had, or others.
    """

    spare = 16

    def __init__(self, where: str, collection: str, dim: int, model: str):
        self.where, self.collection, self.d = where, collection, dim
        server = where.startswith(("http://", "https://"))
        self.has_no_port = server and urlsplit(where).port is None              # the client asks its usual one
        if not server and not (Path(where) / "meta.json").is_file():            # the client would make a new one
            raise InputError(f"--qdrant {where} is neither http://HOST:PORT nor a folder of Qdrant's local mode")
        try:
            import qdrant_client
        except ImportError:
            raise InputError("--qdrant needs its client: pip install -r requirements-export.txt") from None
        self.models = qdrant_client.models
        self.how = {"search_params": self.models.SearchParams(exact=True)} if server else {}    # a folder's is always
        with self.errors_in_one_line():
            self.client = qdrant_client.QdrantClient(
                **{"url": where, "timeout": PATIENCE, "api_key": os.environ.get("QDRANT_API_KEY"),
                   "check_compatibility": False} if server else {"path": where})
        try:
            with self.errors_in_one_line():
                self.changes = self.opened(model)
        except InputError:
            self.client.close()                                                 # a folder is one client's at a time
            raise

    def opened(self, model: str) -> int:
        """Look at the collection; returns its `changes`. Raises InputError for one of others' vectors, or of none."""
        if not self.client.collection_exists(self.collection):
            raise InputError(f"{self.where} has no collection {self.collection}; docs/growing.md loads one")
        found = self.client.get_collection(self.collection).config
        self.ntotal = self.client.count(self.collection, exact=True).count
        vectors, about = found.params.vectors, found.metadata or {}
        size, why = getattr(vectors, "size", "several"), ""                     # a dict, where they have names
        if size != self.d or vectors.distance not in ("Dot", "Cosine"):
            why = f"has vectors of {size} values, to be compared by {getattr(vectors, 'distance', 'each their way')}"
        elif about.get("model") != model or not str(about.get("changes")).isdecimal():
            why = "has another model's vectors, or does not say whose"
        elif not self.ntotal:
            why = "is empty"
        if why:
            raise InputError(f"the collection {self.collection} of {self.where} {why}; load the index's own vectors of "
                             f"{self.d} values, as docs/growing.md does")
        return int(about["changes"])

    @contextmanager
    def errors_in_one_line(self) -> Iterator[None]:
        """What the client and all beneath it complain of, in one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            port = " at port 6333, as the URL names none (behind a proxy it is :443 or :80)" * self.has_no_port
            raise InputError(f"--qdrant {self.where} does not answer{port} ({first_line(error)}); see that it runs and "
                             "is Qdrant, or drop --qdrant") from None

    def search(self, query: np.ndarray, k: int, among: Sequence[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """As FAISS's `Ranking`."""
        scores, numbers = np.full(k, -np.inf, np.float32), np.full(k, -1, np.int64)
        only = None if among is None else self.models.Filter(must=[self.models.HasIdCondition(has_id=among)])
        with self.errors_in_one_line():
            points = self.client.query_points(self.collection, query.tolist(), query_filter=only, limit=k,
                                              with_payload=False, **self.how).points
            scores[:len(points)] = [point.score for point in points]
            numbers[:len(points)] = [point.id for point in points]
        return scores, numbers
