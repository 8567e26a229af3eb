"""Checkpoints that two processes wrote, and ensembles that two processes share, are those of one process."""

import json
import pickle
import shutil

import pytest
import test_ensemble_model as tiny
import torch
import torch.distributed as dist
import two_processes
from test_routing import distance, gate
from tokenizers import Tokenizer
from tokenizers import models as tokenizer_models
from torch.distributed import checkpoint
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from kdlib import models
from kdlib.ensemble import distributed
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.ensemble.pooling import probability_pool
from kdlib.errors import KdlibError
from kdlib.evaluation.metrics import evaluate
from kdlib.models import dcp
from kdlib.training.objective import Distillation, Objective

pytestmark = pytest.mark.usefixtures("one_thread")

UNTIED = {"hidden_size": 24, "num_hidden_layers": 1, "tie_word_embeddings": False}
MEMBERS = {"tied": {}, "untied": UNTIED, "gpt2": {"architecture": "gpt2"}}
# How each checkpoint of two processes holds its model: below what, and with what wrapper's name before its own.
FORMS = {"nested": ("model", ""), "flat": (None, ""), "wrapped": ("app", "_orig_mod.module.")}
HOW = {
    "probability": {},
    "weights": {"weights": [0.2, 0.0, 0.8]},
    "logit": {"pool": "logit"},
    "weighted logit": {"pool": "logit", "weights": [0.5, 0.3, 0.2]},
    "power": {"exponent": 0.4, "weights": [0.5, 0.3, 0.2]},
    "calibrated": {"temperature": 1.7},
    "distance": {"router": distance(top_k=2)},
    "gate": {"router": gate()},
}
SEARCHES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sampling": {"do_sample": True, "top_k": 7},
    "without cache": {"use_cache": False},
}


def built(name):
    return tiny.member(list(MEMBERS).index(name), **MEMBERS[name])


def prompt():
    ids = tiny.text()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return ids, mask


def generated(model, search):
    ids, mask = prompt()
    torch.manual_seed(5)
    return model.generate(ids, attention_mask=mask, max_new_tokens=8, eos_token_id=-1, **({"do_sample": False} | search))


def write_and_share(rank, folder):
    """What both processes do: write checkpoints, and ask ensembles of which each holds a part."""
    torch.set_num_threads(1)
    mesh = init_device_mesh("cpu", (two_processes.SIZE,))
    for name in MEMBERS:
        for form, (place, wrapper) in FORMS.items():
            state = {wrapper + key: distribute_tensor(value, mesh, [Shard(0)]) for key, value in built(name).state_dict().items()}
            moments = {f"{key}.exp_avg": distribute_tensor(torch.ones(5, 3), mesh, [Shard(0)]) for key in state}
            rest = {"optimizer": {"state": moments, "lr": 0.1}, "step": 7}
            checkpoint.save((state if place is None else {place: state}) | rest, checkpoint_id=folder / form / name)
    found = {}
    for name in HOW:
        model = distributed.load(folder / "saved" / name)
        assert len(model.members) == 2 - rank
        with torch.no_grad():
            found[name] = model(prompt()[0]).logits
        if name in ("probability", "gate"):
            found |= {f"{name} {kind}": generated(model, search) for kind, search in SEARCHES.items()}
    model = distributed.load([folder / "nested" / "tied", folder / "plain" / "gpt2"], pool="logit")
    with torch.no_grad():
        found["folders"] = model(prompt()[0]).logits
    found["refused"] = refusals(model, folder)
    ids = prompt()[0] + rank
    try:
        model(ids)
    except KdlibError as error:
        found["another text"] = str(error)
    torch.save(found, folder / f"found{rank}")


def refusals(model, folder):
    calls = [
        lambda: distributed.load([folder / "plain" / "tied"]),
        lambda: distributed.load(folder / "saved" / "logit", pool="logit"),
        lambda: distributed.load(folder / "plain" / "tied"),
        lambda: distributed.load([folder / "plain" / "tied", folder / "nothing"]),
        lambda: model.save_pretrained(folder / "part"),
        lambda: evaluate(model, {}, 8),
        lambda: Objective([Distillation(1.0)], model),
    ]
    found = []
    for call in calls:
        try:
            found.append(call())
        except KdlibError as error:
            found.append(str(error))
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder of members, plain and as two processes wrote them, of ensembles, and of what these two made of them."""
    folder = tmp_path_factory.mktemp("two")
    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(tokenizer_models.WordLevel({f"w{i}": i for i in range(tiny.VOCABULARY)})))
    for name in MEMBERS:
        built(name).save_pretrained(folder / "plain" / name)
        words.save_pretrained(folder / "plain" / name)
        built(name).save_pretrained(folder / "sharded" / name, max_shard_size="8KB")
        for form in FORMS:
            shutil.copytree(folder / "plain" / name, folder / form / name, ignore=lambda *_: ["model.safetensors"])
    for name, how in HOW.items():
        shard = "8KB" if name == "weights" else "1GB"
        EnsembleForCausalLM.from_members([built(one) for one in MEMBERS], **how).save_pretrained(folder / "saved" / name, max_shard_size=shard)
    two_processes.run("test_distributed", "write_and_share", folder)
    return folder


@pytest.fixture(scope="module")
def found(written):
    return [torch.load(written / f"found{rank}") for rank in range(two_processes.SIZE)]


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("form", ["sharded", *FORMS])
def test_every_form_of_a_checkpoint_holds_the_same_bits(written, name, form):
    folder = written / form / name
    assert len(list(folder.glob("*.safetensors"))) > 1 if form == "sharded" else len(list(folder.glob("*.distcp"))) == 2
    plain, loaded = models.load(written / "plain" / name), models.load(folder)
    expected, state = plain.state_dict(), loaded.state_dict()
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    assert not loaded.training and loaded.generation_config.to_dict() == plain.generation_config.to_dict()
    tied = [one.get_output_embeddings().weight is one.get_input_embeddings().weight for one in (plain, loaded)]
    assert tied == [name != "untied"] * 2
    with torch.no_grad():
        assert torch.equal(loaded(prompt()[0]).logits, plain(prompt()[0]).logits)
    half = [models.load(one, torch.bfloat16).state_dict() for one in (written / "plain" / name, folder)]
    assert all(torch.equal(half[0][key], half[1][key]) and half[1][key].dtype == torch.bfloat16 for key in half[0])


@torch.no_grad()
def test_a_teacher_and_members_load_from_a_distributed_checkpoint(written):
    teacher = models.load_teacher(written / "nested" / "untied")
    assert torch.equal(teacher(prompt()[0]).logits, built("untied")(prompt()[0]).logits)
    members = [models.load(written / form / name) for form, name in zip(("wrapped", "sharded", "flat"), MEMBERS, strict=True)]
    whole = EnsembleForCausalLM.from_members([built(name) for name in MEMBERS])(prompt()[0]).logits
    assert torch.equal(EnsembleForCausalLM.from_members(members)(prompt()[0]).logits, whole)


def test_the_state_of_the_optimizer_is_not_read(written, monkeypatch):
    read, read_data = [], dcp._Reader.read_data
    monkeypatch.setattr(dcp._Reader, "read_data", lambda self, plan, planner: read.extend(plan.items) or read_data(self, plan, planner))
    models.load(written / "wrapped" / "gpt2")
    assert {item.storage_index.fqn for item in read} == {f"app._orig_mod.module.{key}" for key in built("gpt2").state_dict()}
    assert len(read) > len(built("gpt2").state_dict()), "tensors were in several pieces"


def single(folder, written, name="tied", **changed):
    """A checkpoint of one process with some tensors changed, or left out where None."""
    shutil.copytree(written / "plain" / name, folder, ignore=lambda *_: ["model.safetensors"])
    state = {key: value for key, value in (built(name).state_dict() | changed).items() if value is not None}
    checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    return folder


NORM = "model.norm.weight"


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({NORM: None}, "got missing: model.norm.weight"),
        ({NORM: torch.ones(17)}, r"model.norm.weight in .* must have shape \[16\], got \[17\]"),
        ({"model.extra.weight": torch.ones(3)}, "got model.extra.weight beside them"),
        ({NORM: {"not": "a tensor"}}, "got missing: model.norm.weight"),
        ({f"ema.{key}": value for key, value in built("tied").state_dict().items()}, "got 2 such models, below '', 'ema.'"),
        ({key: None for key in built("tied").state_dict()} | {"else": torch.ones(3)}, "got none of its tensors"),
        ({f"module.{NORM}": torch.ones(16)}, f"must hold each tensor once, got (module.)?{NORM} with a wrapper's name and without"),
    ],
    ids=["missing", "shape", "more", "no tensor", "two", "none", "twice"],
)
def test_every_tensor_of_a_distributed_checkpoint_is_accounted_for(written, tmp_path, changed, message):
    with pytest.raises(KdlibError, match=message):
        models.load(single(tmp_path / "model", written, **changed))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_tied_head_may_be_left_out_and_moments_with_the_names_of_weights_are_not_read(written, tmp_path):
    moments = {f"optimizer.exp_avg.{key}": value + 1 for key, value in built("tied").state_dict().items()}
    loaded = models.load(single(tmp_path / "model", written, **{"lm_head.weight": None} | moments))
    assert torch.equal(loaded.lm_head.weight, built("tied").lm_head.weight)


class Evil:
    def __reduce__(self):
        return exec, ("open('ran', 'w').close()",)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_metadata_that_would_run_code_are_refused_and_do_not_run(written, tmp_path, monkeypatch):
    folder = single(tmp_path / "model", written)
    monkeypatch.chdir(tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(KdlibError, match=r"must only describe tensors, got builtins.exec, which could run code"):
        models.load(folder)
    assert not (tmp_path / "ran").exists()
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "ran").exists(), "it does run where it is let"


def damage(folder, name, how):
    (path,) = [path for path in folder.iterdir() if path.name == name]
    path.unlink() if how == "missing" else path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("how", ["missing", "cut"])
@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_damaged_file_of_a_distributed_checkpoint_is_named(written, tmp_path, name, how):
    folder = shutil.copytree(written / "nested" / "untied", tmp_path / "model")
    damage(folder, name, how)
    with pytest.raises(KdlibError, match=f"{name} must be "):
        models.load(folder)


@pytest.mark.parametrize("how", ["missing", "cut"])
def test_a_damaged_shard_is_named(written, tmp_path, how):
    folder = shutil.copytree(written / "sharded" / "untied", tmp_path / "model")
    shard = sorted(folder.glob("*.safetensors"))[1].name
    damage(folder, shard, how)
    with pytest.raises(KdlibError, match=f"{shard} must be a whole safetensors file"):
        models.load(folder)


def test_a_plain_folder_with_a_tensor_too_few_or_of_another_shape_is_refused(written, tmp_path):
    one = built("tied")
    one.save_pretrained(tmp_path, state_dict={key: value for key, value in one.state_dict().items() if key != NORM})
    with pytest.raises(KdlibError, match=f"got missing: {NORM}"):
        models.load(tmp_path)
    config = json.loads((written / "plain" / "tied" / "config.json").read_text()) | {"intermediate_size": 25}
    built("tied").save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KdlibError, match=r"got unfit: .*mlp.down_proj.weight of shape \[16, 24\], not \[16, 25\]"):
        models.load(tmp_path)


@pytest.mark.parametrize("name", HOW)
@torch.no_grad()
def test_two_processes_give_the_logits_of_one(written, found, name):
    whole = models.load(written / "saved" / name)(prompt()[0]).logits
    assert torch.equal(found[0][name], found[1][name]) and found[0][name].dtype == whole.dtype
    assert (found[0][name] - whole).abs().max() <= 1e-6


@pytest.mark.parametrize("kind", SEARCHES)
@pytest.mark.parametrize("name", ["probability", "gate"])
def test_two_processes_generate_what_one_does(written, found, name, kind):
    whole = generated(models.load(written / "saved" / name), SEARCHES[kind])
    assert all(torch.equal(one[f"{name} {kind}"], whole) for one in found)


@torch.no_grad()
def test_two_processes_share_members_that_lie_apart(found):
    whole = EnsembleForCausalLM.from_members([built("tied"), built("gpt2")], "logit")(prompt()[0]).logits
    assert all((one["folders"] - whole).abs().max() <= 1e-6 for one in found)


def test_what_a_share_cannot_do_is_refused(found):
    messages = [
        "Processes must be at most 1, the members there are, got 2",
        "A saved ensemble has its own settings, got also pool",
        "must be a saved ensemble, got a LlamaForCausalLM",
        "nothing must be",
        *["must be whole to be evaluated, saved or learned from, got a share"] * 3,
    ]
    for one in found:
        assert all(message in told for message, told in zip(messages, one["refused"], strict=True))
        assert "must ask it about the same text, got another one here" in one["another text"]
    assert not dist.is_initialized()
    with pytest.raises(KdlibError, match="A process group must exist"):
        distributed.load("anywhere")


@torch.no_grad()
def test_each_member_is_asked_where_it_lies_and_answers_where_the_text_is(monkeypatch):
    """Without a second device: what is moved is written down, and stays."""
    ensemble, (ids, mask) = EnsembleForCausalLM.from_members([built(name) for name in MEMBERS]), prompt()
    whole, places, moved, to = ensemble(ids, attention_mask=mask).logits, ("cuda:0", "cuda:1", "cpu"), [], torch.Tensor.to
    lies = dict(zip(ensemble.members, map(torch.device, places), strict=True))

    def record(self, *arguments, **options):
        if not (arguments and isinstance(arguments[0], torch.device)):
            return to(self, *arguments, **options)
        moved.append((tuple(self.shape), arguments[0]))
        return self

    monkeypatch.setattr(PreTrainedModel, "device", property(lies.get))
    monkeypatch.setattr(torch.Tensor, "to", record)
    found = ensemble(ids, attention_mask=mask).logits
    monkeypatch.undo()
    assert torch.equal(found, whole)
    there, back = ((2, 9), (2, 9, tiny.VOCABULARY)), torch.device("cpu")
    asked = [(shape, place) for shape, place in moved if shape in there]
    assert asked == [step for place in lies.values() for step in [(there[0], place)] * 2 + [(there[1], back)]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
@torch.no_grad()
def test_members_on_two_devices_agree_with_one():
    whole = EnsembleForCausalLM.from_members([built(name) for name in MEMBERS])
    apart = EnsembleForCausalLM.from_members([built("tied"), built("untied").cuda(), built("gpt2")])
    ids, mask = prompt()
    assert torch.allclose(apart(ids, attention_mask=mask).logits, whole(ids, attention_mask=mask).logits, atol=1e-4)
    assert torch.equal(generated(apart, SEARCHES["greedy"]), generated(whole, SEARCHES["greedy"]))


@torch.no_grad()
def test_a_device_map_places_each_member(written, tmp_path):
    folder, ids = written / "saved" / "probability", prompt()[0]
    whole = models.load(folder)(ids).logits
    places = {"members.0": "cpu", "members.1": "disk", "members.2": "cpu"}
    placed = EnsembleForCausalLM.from_pretrained(folder, device_map=places, offload_folder=tmp_path)
    assert placed.hf_device_map == places and placed.members[1].device.type == "meta"
    assert torch.equal(placed(ids).logits, whole)
    alone = torch.stack([torch.log_softmax(built(name)(ids).logits, -1) for name in MEMBERS])
    torch.testing.assert_close(whole, probability_pool(alone))
