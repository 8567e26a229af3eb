"""Specialists: clusters as a run, text of a cluster, and members that read one each."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file
from tiny_study import BLOCK_LENGTH, make, step, train_split

from kdlib.data import text
from kdlib.errors import KdlibError
from kdlib.runs import artefacts
from kdlib.study.plan import Planner

CE = {"objective": "ce"}


def members(seeds=(1, 2), profile="smoke", **options):
    return Planner(profile).members("cbtm", list(seeds), **options)


def clusters(profile, **settings):
    return make(profile, "08_clusters", **{"clusters": 3, "dimensions": 8} | settings)


def labels(run):
    return pd.read_parquet(run.path / "clusters" / "documents.parquet").set_index("document").cluster


# The run


@pytest.mark.parametrize("random", [False, True])
def test_a_run_leaves_a_cluster_a_document_and_what_places_a_text(profile, random):
    run, train = clusters(profile, random=random), train_split(profile)
    found = labels(run)
    assert found.index.tolist() == train.documents.document.tolist()
    assert np.ptp(np.bincount(found)) <= 1 and run.metrics["documents"] == np.bincount(found).tolist()
    tokens = train.documents.tokens.groupby(found.to_numpy()).sum()
    assert run.metrics["cluster_tokens"] == tokens.tolist()
    kept, vocabulary = load_file(run.path / "clusters" / "clusters.safetensors"), len(artefacts.load_tokenizer(make(profile, "01_corpus")))
    assert {name: (one.dtype, one.shape) for name, one in kept.items()} == {
        "token_vectors": (np.float32, (vocabulary, 8)),
        "centroids": (np.float32, (3, 8)),
    }
    assert not kept["token_vectors"][train.separator_id].any()
    sums = np.stack([kept["token_vectors"][part].sum(0) for part in np.split(train.tokens, train.offsets[1:-1])])
    points = sums / np.linalg.norm(sums, axis=1, keepdims=True)
    for cluster in range(3):
        np.testing.assert_allclose(kept["centroids"][cluster], points[found == cluster].mean(0), atol=1e-5)


def test_clusters_see_what_random_ones_do_not(profile):
    domain = train_split(profile).documents.domain.to_numpy()
    together = {}
    for random in (False, True):
        run = clusters(profile, clusters=2, random=random)
        held = labels(run)[domain == "many"].value_counts(normalize=True)
        together[random] = held.max()
    assert together[False] > 0.95 > together[True], "one domain has words that the other lacks"
    distance = [clusters(profile, clusters=2, random=random).metrics["distance"] for random in (False, True)]
    assert distance[0] < distance[1]


def test_more_clusters_than_documents_are_refused(profile):
    documents = len(train_split(profile).documents)
    with pytest.raises(KdlibError, match=f"`clusters` must be 1 to {documents}, the number of documents, got 1000"):
        clusters(profile, clusters=1000)
    with pytest.raises(KdlibError, match="clusters: .*greater than or equal to 2"):
        step(profile, "08_clusters", clusters=1)


# The text


def taken(profile, run, cluster, own=0.8, seed=3):
    given = text.Given(train_split(profile), None, BLOCK_LENGTH, seed, {"clusters": run})
    return text.way({"clustered": {"cluster": cluster, "own": own}}).take(given)


@pytest.mark.parametrize("own", [0.5, 0.8, 1.0])
def test_a_text_has_the_share_of_its_cluster_and_as_many_tokens_as_the_split(profile, own):
    run, train = clusters(profile), train_split(profile)
    tokens, found, total = train.documents.set_index("document").tokens, labels(run), train.documents.tokens.sum()
    for cluster in range(3):
        documents = pd.Series(taken(profile, run, cluster, own).documents)
        inside = (found[documents] == cluster).to_numpy()
        for part, share in ((documents[inside], own), (documents[~inside], 1 - own)):
            assert abs(tokens[part].sum() - share * total) <= tokens.max() / 2
        times = Counter(documents[inside])
        assert max(times.values()) - min(times.values()) <= 1, "all before any again"
        assert len(times) == (found == cluster).sum() or max(times.values()) == 1
        assert inside.all() == (own == 1.0)


def test_the_draw_goes_by_its_seed_or_the_students(profile):
    run = clusters(profile)
    assert taken(profile, run, 1, seed=3).documents == taken(profile, run, 1, seed=3).documents
    assert taken(profile, run, 1, seed=3).documents != taken(profile, run, 1, seed=4).documents
    given = text.Given(train_split(profile), None, BLOCK_LENGTH, 9, {"clusters": run})
    set_apart = text.way({"clustered": {"cluster": 1, "seed": 3}}).take(given)
    assert set_apart.documents == taken(profile, run, 1, seed=3).documents


def test_a_cluster_that_is_not_there_is_refused_in_the_plan():
    with pytest.raises(KdlibError, match="`cluster` must be 0 to 2, one of 3 clusters, got 3"):
        Planner("smoke").student(text={"clustered": {"by": {"clusters": {"clusters": 3}}, "cluster": 3}})
    with pytest.raises(KdlibError, match="must leave clusters, got student"):
        Planner("smoke").student(text={"clustered": {"by": {"student": {}}, "cluster": 0}})


# The method


def test_each_member_reads_a_cluster_of_its_own_and_differs_in_nothing_else():
    plan, found = Planner("smoke"), members([5, 2, 7], own=0.6)
    shared = plan.run("clusters", clusters=3, seed=5)
    assert {one.inputs["clusters"].id for one in found} == {shared.id}
    for place, (seed, one) in enumerate(zip([5, 2, 7], found, strict=True)):
        assert one.settings["parameters"]["text"] == {"clustered": {"cluster": place, "own": 0.6, "seed": seed}}
        plain = plan.student(seed=seed).parameters
        assert one.parameters.model_copy(update={"text": plain.text}) == plain
    (control,) = {one.inputs["clusters"].id for one in members([5, 2, 7], random=True)}
    assert control == plan.run("clusters", clusters=3, seed=5, random=True).id != shared.id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"own": 0}, "must be among own, dimensions, random, got own: .*greater than 0"),
        ({"seeds": [1]}, "clusters: .*greater than or equal to 2"),
        ({"seeds": [1, 1]}, "seeds must be unique"),
        ({"student": CE | {"text": "unigram"}}, "text of student must be left out"),
    ],
)
def test_what_cannot_be_specialised_is_refused(options, message):
    with pytest.raises(KdlibError, match=message):
        members(**{"seeds": [1, 2]} | options)


@pytest.mark.parametrize("student", [CE, {}], ids=["ce", "kd"])
def test_specialists_are_trained_pooled_and_know_their_own_text(profile, student):
    asked = {"method": "cbtm", "options": {"own": 1.0, "dimensions": 8}, "seeds": [1, 2], "student": student}
    run = make(profile, "05_ensemble", **asked)
    planned = members([1, 2], profile, own=1.0, dimensions=8, student=student)
    assert run.metrics["members"] == sorted(one.id for one in planned)
    found = [run.beside(one.id).metrics for one in planned]
    plain = make(profile, **student, seed=1).metrics["training"]["tokens"]
    assert [one["training"]["tokens"] for one in found] == pytest.approx([plain, plain], rel=0.05)
    # Clusters of two domains are these domains: each member is the better one at home.
    few, many = ([one["domains"]["test"][domain]["nll"] for one in found] for domain in ("few", "many"))
    assert (few[0] < few[1]) != (many[0] < many[1])
