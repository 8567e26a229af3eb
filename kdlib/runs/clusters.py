"""Clusters: the documents of the train split in groups of one size, by what they are about, and where a text lies among them."""

import time
from pathlib import Path

from pydantic import Field

from kdlib.study import parameters
from kdlib.study.plan import Planner, Step
from kdlib.study.store import Run
from kdlib.study.work import entry

NOTEBOOK, LEAVES = "08_clusters", "clusters"


class Parameters(parameters.Parameters):
    """``08_clusters``."""

    clusters: int = Field(4, ge=2, le=1024, description="how many; their numbers of documents differ by one at most")
    dimensions: int = Field(100, ge=1, le=1024, description="of the vectors that are clustered, or as many as the text allows")
    random: bool = Field(False, description="documents shared out at random: the control, with the same sizes")
    seed: parameters.Seed = Field(0, description="of the vectors, and of where clustering begins or what is shared out")


def inputs(values: Parameters, plan: Planner) -> dict[str, Step]:
    """The corpus."""
    return {"corpus": plan.corpus()}


def downloads(values: Parameters) -> dict[str, str]:
    """Nothing."""
    return {}


def label(values: Parameters) -> str:
    """How many."""
    return f"{values.clusters} {'random ' if values.random else ''}clusters"


def produce(step: Step, inputs: dict[str, Run], folder: Path) -> dict:
    """Cluster the train split's documents.

    Leaves ``clusters/documents.parquet`` (document, cluster) and ``clusters/clusters.safetensors``: ``token_vectors`` float32
    [V, D] and ``centroids`` float32 [K, D], such that the normalised sum of a text's token vectors lies among the centroids.
    """
    import numpy as np
    from safetensors.numpy import save_file

    from kdlib.data import clustering, corpus
    from kdlib.runs import artefacts

    started, values, text = time.perf_counter(), step.parameters, inputs["corpus"]
    train, tokenizer = corpus.load_split(text.path / "data", "train"), artefacts.load_tokenizer(text)
    sizes = clustering.equal_sizes(len(train.documents), values.clusters)
    special = set(tokenizer.all_special_ids)
    pieces = ["" if number in special else tokenizer.decode([number]) for number in range(len(tokenizer))]
    found = clustering.counts(train, len(pieces))
    vectors = clustering.token_vectors(found, clustering.token_classes(pieces), values.dimensions, values.seed)
    points = clustering.document_vectors(found, vectors)
    if values.random:
        labels, rounds = np.random.default_rng(values.seed).permutation(np.repeat(np.arange(values.clusters), sizes)), 0
        centroids = clustering.means(points, labels, values.clusters)
    else:
        labels, centroids, rounds = clustering.balanced_kmeans(points, values.clusters, values.seed)
    (folder / "clusters").mkdir(exist_ok=True)
    train.documents[["document"]].assign(cluster=labels).to_parquet(folder / "clusters" / "documents.parquet", index=False)
    tensors = {"token_vectors": vectors, "centroids": centroids.astype(np.float32)}
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()}, folder / "clusters" / "clusters.safetensors")
    distances = clustering.squared_distances(points, centroids)
    return {
        "documents": np.bincount(labels, minlength=values.clusters).tolist(),
        "cluster_tokens": np.bincount(labels, train.documents.tokens, values.clusters).astype(int).tolist(),
        "distance": float(distances[np.arange(len(labels)), labels].mean()),
        "at_nearest": float((distances.argmin(1) == labels).mean()),
        # Products of points and centres; what else it takes is no matrix product, or as little as this.
        "work": {"scoring": entry((rounds + 1) * 2 * points.size * values.clusters, time.perf_counter() - started)},
    }
