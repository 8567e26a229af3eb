"""What the tour looks at: distributions read from models against closed forms, and pictures that show what they were given."""

import math
import subprocess
import sys
from itertools import pairwise

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
import synthetic_results
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kdlib.analysis import figures, tour
from kdlib.cache import Kind
from kdlib.ensemble.model import EnsembleForCausalLM
from kdlib.errors import KdlibError
from kdlib.evaluation import reading
from kdlib.models import Shape, build
from kdlib.study.plan import Planner

pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["<|endoftext|>", *"abcdefghijklmno"]


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="o"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def members(tokenizer):
    return [build(Shape(layers=1, hidden_size=16, heads=2), tokenizer, 12, seed).eval() for seed in (1, 2, 3)]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_surprise_is_the_loss_of_the_model_on_the_text(members, tokenizer):
    found = reading.read(members[0], tokenizer, "a b c d")
    ids = torch.tensor([[0, 1, 2, 3, 4]])
    torch.testing.assert_close(found.surprise.mean(), members[0](input_ids=ids, labels=ids).loss.detach())
    assert found.tokens == ["a", "b", "c", "d"] and found.expected.shape == (5, len(WORDS))
    torch.testing.assert_close(found.expected.exp().sum(-1), torch.ones(5))
    ids = reading.read(members[0], tokenizer, [1, 2, 3, 4])
    assert torch.equal(found.surprise, ids.surprise)
    pieces, coloured = found.after(3)
    assert pieces == found.tokens and coloured.isnan().tolist() == [True, True, True, False]


def test_a_pool_is_read_like_a_model(members, tokenizer):
    together = reading.read(EnsembleForCausalLM.from_members(members), tokenizer, "a b")
    alone = torch.stack([reading.read(one, tokenizer, "a b").expected.exp() for one in members])
    torch.testing.assert_close(together.expected.exp(), alone.mean(0))


@pytest.mark.parametrize("text", ["", "a b c d e f g h i j k l m"])
def test_a_text_that_no_model_can_read_is_refused(text, members, tokenizer):
    with pytest.raises(KdlibError, match="`text` must have 1 to 11 tokens"):
        reading.read(members[0], tokenizer, text)


def test_disagreement_is_the_mean_divergence_from_the_pool_and_bounded_by_log_k(members, tokenizer):
    readings = [reading.read(one, tokenizer, "a b c") for one in members]
    p = torch.stack([one.expected[:-1].double().exp() for one in readings])
    wanted = (p * (p / p.mean(0)).log()).sum(-1).mean(0)
    torch.testing.assert_close(reading.disagreement(readings), wanted.float())
    assert reading.disagreement([readings[0]] * 3).abs().max() < 1e-6
    sure = [reading.Reading(["x"], torch.zeros(1), torch.eye(3).log()[[k, k]]) for k in range(3)]
    assert reading.disagreement(sure).item() == pytest.approx(math.log(3))


def test_draws_are_right_on_average_and_the_largest_are_kept_as_they_are():
    p = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])
    draws = torch.stack([reading.kept(p.log(), Kind("sampled", draws=32), seed) for seed in range(400)])
    assert (32 * draws).frac().abs().max() == 0 and torch.allclose(draws.sum(-1), torch.ones(400))
    error = (draws.mean(0) - p).abs() / (p * (1 - p) / 32 / 400).sqrt()
    assert error.max() < 4
    top = reading.kept(p.log(), Kind("topk", top_k=2))
    assert top[2:].tolist() == [0, 0, 0] and torch.allclose(top[:2], p[:2], rtol=0.05)
    assert not torch.equal(draws[0], draws[1])


def test_likeliest_tokens_come_first(tokenizer):
    p = torch.full((len(WORDS),), 0.02)
    p[3], p[5] = 0.4, 0.3
    (first, one, p_first), (second, two, _) = reading.likeliest(p.log(), tokenizer, 2)
    assert (first, one, second, two) == ("c", 3, "e", 5) and p_first == pytest.approx(0.4)


def test_writing_follows_its_seed_leaves_the_random_state_and_stays_in_the_context(members, tokenizer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, again, other = (reading.write(members[0], tokenizer, "a b", 100, seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert first == again != other and first[:2] == [1, 2]
    assert all(len(one) <= 11 and 0 not in one for one in (first, other))
    assert reading.write(members[0], tokenizer, "a b c d e f g h i j k", 5, 1) == list(range(1, 12))


def test_losses_of_every_pool_follow_from_stored_log_probabilities():
    p = np.array([[0.5, 0.1], [0.25, 0.3], [0.25, 0.2]])
    found = tour.pool_losses(list(np.log(p)))
    assert found.members.value_counts().to_dict() == {1: 3, 2: 3, 3: 1}
    assert found.nll.iloc[-1] == pytest.approx(-np.log(p.mean(0)).mean())
    means = found.groupby("members").nll.mean()
    assert all(more < fewer for fewer, more in pairwise(means))


def test_the_growing_pool_says_the_size_it_was_asked_for():
    losses = tour.pool_losses(list(np.log([[0.5, 0.1], [0.25, 0.3]])))
    tour.growing(losses, 2, ("teacher", 1.0))
    title = plt.gca().get_title(loc="left") or plt.gca().get_title()
    mean = losses.groupby("members").nll.mean()
    assert title == f"2 members: {mean[2]:.3f} nats/token, {mean[1] - mean[2]:.3f} better than one alone"
    tour.growing(losses, 1, ("teacher", 1.0))
    assert "1 member:" in (plt.gca().get_title(loc="left") or plt.gca().get_title())


def test_a_coloured_text_keeps_every_letter_in_lines_that_fit_and_is_darkest_at_its_largest_number():
    pieces = [f" w{number}" for number in range(60)]
    values = np.arange(60.0)
    values[0] = np.nan
    tour.coloured({"heading": (pieces, values)}, "nats")
    axis = plt.gca()
    texts = {text.get_text(): text.get_position() for text in axis.texts}
    assert set(pieces) <= set(texts) and {"heading", "59 nats"} <= set(texts)
    assert max(texts[piece][0] + len(piece) for piece in pieces) <= tour.COLUMNS
    assert len({texts[piece][1] for piece in pieces}) == 3
    boxes = {patch.get_xy(): patch.get_facecolor() for patch in axis.patches}
    column, line = texts[" w59"]
    assert boxes[(column, line - 0.42)] == tour._HEAT(1.0)
    assert (0, texts[" w0"][1] - 0.42) not in boxes, "no number, no colour"


def test_letters_are_as_wide_as_the_boxes_behind_them():
    tour.coloured({"h": (["m" * 40], [1.0])}, "nats")
    figure, axis = plt.gcf(), plt.gca()
    figure.canvas.draw()
    (text,) = [one for one in axis.texts if one.get_text() == "m" * 40]
    box = text.get_window_extent().transformed(axis.transData.inverted())
    assert box.width == pytest.approx(40, rel=0.04)


def test_what_cannot_be_drawn_is_shown_by_a_sign():
    assert tour._visible(" a\n") == " a¶" and tour._visible("�\t") == "··" and tour._visible("<|endoftext|>") == "(end)"


def test_a_slider_redraws_and_is_a_picture_where_there_is_no_front_end():
    drawn = []

    def draw(value):
        drawn.append(value)
        plt.subplots(figsize=(2, 1))[1].set_title(str(value))

    figures.use_style()
    slider = tour.Slider(draw, "draws", [1, 2, 4], first=2)
    data, metadata = slider._repr_mimebundle_()
    assert drawn == [2] and data["text/plain"] == "draws: 2" and plt.get_fignums() == []
    assert metadata["image/png"]["width"] == pytest.approx(200, abs=2)
    assert "application/vnd.jupyter.widget-view+json" in data and len(data["image/png"]) > 500
    choice, image = slider._widget(slider.png(2), 200).children
    before = image.value
    choice.value = 4
    assert drawn[-1] == 4 and image.value != before and isinstance(choice, ipywidgets.SelectionSlider)


def test_opinions_name_each_member_and_its_choices():
    found = tour.opinions([[("a", 1, 0.5), ("b", 2, 0.25)], [("c", 3, 0.125), ("d", 4, 0.1)]])
    assert found.headings == ["Member", "Choice 1", "Choice 2"]
    assert found.body == [["student 1", "“a” 0.50", "“b” 0.25"], ["student 2", "“c” 0.12", "“d” 0.10"]]


def test_pictures_of_the_tour_are_drawn_without_torch():
    code = "import sys\nfrom kdlib.analysis import tour\nprint(sorted({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_a_bill_adds_up_and_counts_shared_work_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KDLIB_HOME", str(tmp_path))
    synthetic_results.write("smoke")
    plan = Planner("smoke")
    students = [plan.student(objective="kd", seed=seed) for seed in (1, 2)]
    runs = {"one": students[0].run(), "both": plan.ensemble(students).run(), "text": plan.student(objective="ce", seed=1).run()}
    found = tour.costs("smoke", runs).set_index("model")
    assert found.training["both"] == pytest.approx(2 * found.training["one"])
    for shared in ("teacher", "targets"):
        assert found[shared]["both"] == pytest.approx(found[shared]["one"]) and found[shared]["one"] > 0
        assert found[shared]["text"] == pytest.approx(0)
    shown = tour.summary(runs, found.reset_index())
    assert [row[-1] for row in shown.body if row[0].endswith("one")] == [f"{found.loc['one'].sum():.0f}"]
    assert sum(shown.best) == 1
