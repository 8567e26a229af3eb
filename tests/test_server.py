"""Completion servers as teachers: real llama.cpp, a recorded answer of real vLLM, imitations of what others answer, and faults.

The imitations are HTTP servers that run a tiny transformers model and answer in the formats of vLLM 0.32.0, SGLang, llama.cpp
and llama-cpp-python 0.3.36, as read from their sources; the first and the third were compared with the real servers' answers.
"""

import itertools
import json
import re
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import gguf
import numpy as np
import pytest
import torch
from tiny import BLOCK, contents, make_split, predicting
from tokenizers import Tokenizer, decoders, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

from kdlib.cache import Kind, ModelTeacher, ServerTeacher, TargetCache, server, write_targets
from kdlib.cache.server import CompletionServer
from kdlib.errors import KdlibError

torch.set_num_threads(1)
K = 5
# The last two are bytes that begin a character: alone, each is written as a replacement character.
TOKENS = ["<|endoftext|>", *map(chr, range(ord("a"), ord("z") + 1)), "Ã", "Ä"]


def make_tokenizer(tokens):
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=tokens[0])


TOKENIZER = make_tokenizer(TOKENS)
DISTINCT = make_tokenizer([*TOKENS[:-2], "0", "1"])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "tie_word_embeddings": False}
    config = Qwen2Config(vocab_size=len(TOKENS), initializer_range=0.3, **shape, **heads)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def top(model, window, k=K):
    logits = model(torch.as_tensor(np.asarray(window))[None]).logits[0]
    values, ids = torch.log_softmax(logits, -1).topk(k)
    return ids.numpy(), values.numpy()


def windows(*lengths):
    rng = np.random.default_rng(0)
    return [rng.integers(0, len(TOKENS), length) for length in lengths]


# What the servers answer: body -> (status, JSON), given a function for the model's log-probabilities of a prompt


def completion(prompt, log_probabilities, tokens=1):
    usage = {"prompt_tokens": len(prompt), "completion_tokens": tokens, "total_tokens": len(prompt) + tokens}
    choice = {"index": 0, "text": "", "logprobs": log_probabilities, "finish_reason": "length"}
    return 200, {"object": "text_completion", "model": "tiny", "choices": [choice], "usage": usage}


def vllm(body, dense, name="token_id:{}".format):
    """Each entry names its own token first, then the k most likely."""
    prompt, k = body["prompt"], body["logprobs"]
    if k > 20:
        message = (
            f"Requested sample logprobs of {k}, which is greater than max allowed: 20 (parameter=logprobs, value={k})"
        )
        return 400, {"error": {"message": message, "type": "BadRequestError", "param": "logprobs", "code": 400}}
    table = dense(prompt)
    tokens = [*prompt, int(table[-1].argmax())]
    entries = [None]
    for token, row in zip(tokens[1:], table, strict=True):
        ids = dict.fromkeys([token, *row.topk(k).indices.tolist()])
        entries.append({name(i): max(row[i].item(), -9999.0) for i in ids})
    first = 0 if body["echo"] else len(prompt)
    own = [None if entry is None else entry[name(token)] for token, entry in zip(tokens, entries, strict=True)]
    shown = {"tokens": [*map(name, tokens)][first:], "token_logprobs": own[first:], "top_logprobs": entries[first:]}
    return completion(prompt, shown | {"text_offset": [0] * len(shown["tokens"])})


def sglang(body, dense):
    """Tokens by their texts, so that those of one text become one entry."""
    return vllm(body, dense, name=lambda i: TOKENIZER.decode([i]))


def sglang_distinct(body, dense):
    return vllm(body, dense, name=lambda i: DISTINCT.decode([i]))


def llama_cpp(body, dense):
    """The generated token only, whatever ``echo`` says, and nothing if it is part of a character."""
    row = dense(body["prompt"])[-1]
    biased = row.clone()
    for i, bias in body.get("logit_bias", {}).items():
        biased[int(i)] += bias
    generated = int(biased.argmax())
    likely = [
        {"id": i, "token": TOKENIZER.decode([i]), "bytes": [], "logprob": row[i].item()}
        for i in row.topk(body["logprobs"]).indices.tolist()
    ]
    one = {"id": generated, "logprob": row[generated].item(), "top_logprobs": likely}
    return completion(body["prompt"], None if generated in (27, 28) else {"content": [one]})


def biased(body, dense):
    """What it reports includes logit_bias."""
    bias = torch.zeros(len(TOKENS))
    for i, value in body.get("logit_bias", {}).items():
        bias[int(i)] = value
    return llama_cpp(body, lambda prompt: torch.log_softmax(dense(prompt) + bias, -1))


def llama_cpp_python(body, dense):
    problem = {"type": "string_type", "loc": ["body", "prompt", "str"], "msg": "Input should be a valid string"}
    error = {"message": f"4 validation errors: {problem}", "type": "internal_server_error", "param": None, "code": None}
    return 500, {"error": error}


class Imitation:
    """An HTTP server that answers as ``style`` does; each fault takes one exchange over, in order."""

    def __init__(self, model, style=vllm, faults=(), change=None):
        self.faults, self.seen, self.released = list(faults), [], threading.Event()
        outer = self

        @torch.no_grad()
        def dense(prompt):
            return torch.log_softmax(model(torch.tensor([prompt])).logits[0], -1)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.respond(lambda: (200, {"object": "list", "data": [{"id": "tiny"}, {"id": "large"}]}))

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.respond(lambda: style(body, dense))

            def respond(self, answer):
                outer.seen.append(dict(self.headers))
                if self.path not in ("/v1/models", "/v1/completions"):
                    return self.send(404, b"no such page")
                if outer.faults and self.command == "POST":
                    return outer.faults.pop(0)(self)
                status, content = answer()
                if change and self.command == "POST":
                    change(content)
                return self.send(status, json.dumps(content).encode())

            def send(self, status, data, claimed=None, **headers):
                self.send_response(status)
                for name, value in {"Content-Length": str(claimed or len(data)), **headers}.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self):
        self.released.set()
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def imitate(model, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    started = []

    def start(*arguments, **keywords):
        started.append(Imitation(model, *arguments, **keywords))
        return started[-1]

    yield start
    for one in started:
        one.close()


@pytest.fixture
def waits(monkeypatch):
    """Seconds that the client would have waited."""
    waited = []
    monkeypatch.setattr(server, "sleep", waited.append)
    return waited


def client(url, tokenizer=TOKENIZER, **settings):
    return CompletionServer(
        url, "tiny", settings.pop("top_k", K), tokenizer, **{"timeout": 20.0, "retries": 2} | settings
    )


def unavailable(handler):
    handler.send(503, b'{"error": {"message": "Loading model"}}')


def drop(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def cut_short(handler):
    handler.send(200, b'{"choices": [', claimed=1000)
    drop(handler)


# What is returned


@pytest.mark.parametrize(
    ("style", "tokenizer", "per_position"),
    [(vllm, TOKENIZER, False), (sglang_distinct, DISTINCT, False), (vllm, TOKENIZER, True), (llama_cpp, TOKENIZER, True)],
)  # fmt: skip
def test_every_position_of_every_window_has_the_models_own_top_k_bit_for_bit(
    style, tokenizer, per_position, model, imitate
):
    asked = client(imitate(style).url, tokenizer, per_position=per_position)
    asked.check()
    sent = windows(1, 2, 17, 5, 9)
    for window, (ids, log_probabilities) in zip(sent, asked.top_log_probabilities(sent), strict=True):
        # A prefix alone and as part of a longer prompt differ in the last bits, in any implementation.
        prompts = [window[:end] for end in range(1, len(window) + 1)] if per_position else [window]
        last = slice(-1, None) if per_position else slice(None)
        expected_ids, expected = (
            np.concatenate(part) for part in zip(*[[x[last] for x in top(model, one)] for one in prompts], strict=True)
        )
        assert ids.dtype == np.int64 and log_probabilities.dtype == np.float32
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_array_equal(log_probabilities, expected)


def test_the_address_may_end_in_v1(model, imitate):
    (ids, _), = client(imitate().url + "/v1/").top_log_probabilities(windows(3))  # fmt: skip
    np.testing.assert_array_equal(ids, top(model, windows(3)[0])[0])


# vLLM 0.32.0 (CPU build, float32) on this file's model, asked for the prompt [0, 8, 27, 3] and 3 log-probabilities; whole but for
# its prompt_logprobs, which say the same again.
RECORDED = """{"id":"cmpl-a7ac4d93e4e72087","object":"text_completion","created":1795389370,"model":"tiny","choices":[{"index":0,
"text":"<|endoftext|>h\ufffdct","logprobs":{"text_offset":[0,10,20,31,41],"token_logprobs":[null,-4.621326446533203,
-1.5946509838104248,-4.200175762176514,-1.9072076082229614],"tokens":["token_id:0","token_id:8","token_id:27","token_id:3",
"token_id:20"],"top_logprobs":[null,{"token_id:8":-4.621326446533203,"token_id:15":-1.4964779615402222,"token_id:28":
-1.5729120969772339,"token_id:21":-1.612848162651062},{"token_id:27":-1.5946509838104248,"token_id:9":-1.32761549949646,
"token_id:1":-1.4108738899230957},{"token_id:3":-4.200175762176514,"token_id:27":-1.4323410987854004,"token_id:1":
-1.6455042362213135,"token_id:9":-1.7138969898223877},{"token_id:20":-1.9072076082229614,"token_id:3":-1.676606297492981,
"token_id:26":-1.7783187627792358,"token_id:27":-1.815531849861145}]},"finish_reason":"length","stop_reason":null,
"token_ids":null,"prompt_token_ids":null,"routed_experts":null}],"service_tier":null,"system_fingerprint":
"vllm-0.32.0-9d56cd1d","usage":{"prompt_tokens":4,"total_tokens":5,"completion_tokens":1,"prompt_tokens_details":null,
"completion_tokens_details":null},"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}"""


def test_a_recorded_answer_of_vllm_is_read(imitate):
    recorded = json.loads(RECORDED)
    (ids, log_probabilities), = client(imitate(lambda *_: (200, recorded)).url, top_k=3).top_log_probabilities(
        [np.array([0, 8, 27, 3])]
    )  # fmt: skip
    assert ids.tolist() == [[15, 28, 21], [9, 1, 27], [27, 1, 9], [3, 26, 27]]
    expected = [
        [-1.4964780, -1.5729121, -1.6128482],
        [-1.3276155, -1.4108739, -1.5946510],
        [-1.4323411, -1.6455042, -1.7138970],
    ]
    expected.append([-1.6766063, -1.7783188, -1.8155318])
    np.testing.assert_allclose(log_probabilities, expected, atol=1e-7)


# llama.cpp, the real one

SERVE = """
import sys, time, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.port, params.n_parallel = sys.argv[1], 64, 0, 1
params.model_alias = {"tiny"}
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.warmup = params.fit_params = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def write_gguf(path, model):
    config = model.config
    writer = gguf.GGUFWriter(str(path), "qwen2")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (len(TOKENS) - 1))
    writer.add_token_merges(["a b"])  # llama.cpp wants one
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(False)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def llama_server(model, tmp_path_factory):
    pytest.importorskip("xllamacpp")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, model)
    command = [sys.executable, "-c", SERVE, str(path)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    address = next((line.strip() for line in process.stdout if line.startswith("http")), None)
    assert address, "llama.cpp's server did not start"
    yield address
    process.kill()
    process.communicate()


def test_a_real_llama_cpp_server_returns_the_models_own_top_k(llama_server, model, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    asked = client(llama_server, per_position=True, top_k=20)
    asked.check()
    sent = windows(1, 2, 30, 63)
    for window, (ids, log_probabilities) in zip(sent, asked.top_log_probabilities(sent), strict=True):
        expected_ids, expected = top(model, window, 20)
        np.testing.assert_array_equal(ids, expected_ids)
        np.testing.assert_allclose(log_probabilities, expected, atol=1e-4)


def test_a_real_llama_cpp_server_cannot_be_asked_for_whole_prompts_or_past_its_context(llama_server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(KdlibError, match=r"ignores echo.*per_position=True"):
        client(llama_server).check()
    with pytest.raises(KdlibError, match=r"exceeds the available context size.*shorter than a window"):
        client(llama_server, per_position=True).top_log_probabilities(windows(70))


def targets_of(folder, teacher, split):
    """Cached targets of a split, in several shards, read back."""
    guard = {"vocabulary": len(TOKENS)}
    write_targets(folder, teacher, split, guard, Kind("topk", top_k=K), block_length=BLOCK, shard_tokens=60)
    return TargetCache(folder, guard, 1.0).read(predicting(split))


def test_targets_from_a_real_server_are_those_that_the_model_writes_itself(llama_server, model, tmp_path, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    split, teacher = make_split(), ServerTeacher(client(llama_server, per_position=True))
    served, own = targets_of(tmp_path / "served", teacher, split), targets_of(tmp_path / "own", ModelTeacher(model), split)
    dense = [torch.zeros(len(one), len(TOKENS)).scatter_add_(1, one.ids, one.weights) for one in (served, own)]
    # Weights are rounded to values 10 % apart, and two that lie at an edge may fall to either side of it.
    assert torch.equal(dense[0] > 0, dense[1] > 0) and torch.allclose(*dense, rtol=0.11)
    assert torch.allclose(served.tail, own.tail, rtol=1e-2, atol=1e-4)


def test_a_writer_whose_server_went_away_goes_on_where_it_stopped(imitate, waits, tmp_path):
    split, answers = make_split(), itertools.count(1)

    def mortal(body, dense):
        return vllm(body, dense) if next(answers) <= 8 else (500, {"error": {"message": "out of memory"}})

    targets_of(tmp_path / "whole", ServerTeacher(client(imitate().url)), split)
    with pytest.raises(KdlibError, match="out of memory"):
        targets_of(tmp_path / "cut", ServerTeacher(client(imitate(mortal).url)), split)
    begun = set(contents(tmp_path / "cut"))
    assert "00000.safetensors" in begun and "manifest.json" not in begun
    again = imitate()
    targets_of(tmp_path / "cut", ServerTeacher(client(again.url)), split)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    assert len(again.seen) < len(split.windows(BLOCK)), "what was there was asked for again"


# Faults of the connection


def test_a_server_that_fails_twice_is_asked_again_with_growing_waits(imitate, waits):
    running = imitate(faults=[unavailable, unavailable])
    assert len(client(running.url).top_log_probabilities(windows(4))) == 1
    assert waits == [0.5, 1.0] and len(running.seen) == 3


@pytest.mark.parametrize("fault", [drop, cut_short])
def test_a_lost_connection_is_made_again(fault, imitate, waits):
    assert len(client(imitate(faults=[fault]).url).top_log_probabilities(windows(4))) == 1
    assert waits == [0.5]


def test_retry_after_is_honoured_as_seconds_and_as_a_date(imitate, waits):
    faults = [
        lambda handler: handler.send(429, b"{}", Retry_After="7"),
        lambda handler: handler.send(503, b"{}", Retry_After=f"{handler.date_time_string(time.time() + 40)}"),
    ]
    client(imitate(faults=faults).url).top_log_probabilities(windows(2))
    assert waits[0] == 7 and 30 < waits[1] <= 41


def test_a_server_that_asks_for_too_long_a_wait_is_given_up(imitate, waits):
    faults = [lambda handler: handler.send(429, b"later", Retry_After="3600")]
    with pytest.raises(KdlibError, match=r"1 attempts.*HTTP 429: later"):
        client(imitate(faults=faults).url).top_log_probabilities(windows(2))
    assert waits == []


def test_a_server_that_hangs_is_given_up_after_the_timeout_and_all_attempts(imitate, waits):
    running = imitate()
    running.faults = [lambda handler: running.released.wait(20)] * 3
    with pytest.raises(KdlibError, match=rf"{running.url}/v1/completions must answer in 3 attempts of 0.2 s.*Timeout"):
        client(running.url, timeout=0.2).top_log_probabilities(windows(2))
    assert waits == [0.5, 1.0]


def test_an_address_where_nobody_listens_is_named(waits):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(KdlibError, match=rf"127.0.0.1:{port}/v1/models must answer in 3 attempts"):
        client(f"http://127.0.0.1:{port}").check()


def test_what_the_server_refuses_is_not_asked_again(imitate, waits):
    running = imitate()
    with pytest.raises(KdlibError, match=r"HTTP 400.*greater than max allowed: 20.*--max-logprobs"):
        client(running.url, top_k=25).top_log_probabilities(windows(2))
    assert waits == [] and len(running.seen) == 1


def test_a_redirect_is_not_followed(imitate, waits):
    elsewhere = imitate()
    faults = [lambda handler: handler.send(307, b"", Location=f"{elsewhere.url}/v1/completions")]
    with pytest.raises(KdlibError, match="HTTP 307"):
        client(imitate(faults=faults).url).top_log_probabilities(windows(2))
    assert elsewhere.seen == []


@pytest.mark.parametrize(
    "text", [b"<html>Welcome</html>", b"[]", b'{"choices": ', b'{"choices": 3}', b'{"choices": []}']
)
def test_an_answer_that_is_no_completion_is_shown(text, imitate):
    with pytest.raises(KdlibError, match=r"must be a JSON object|must have a list 'choices'|must return one completion, got 0"):
        client(imitate(faults=[lambda handler: handler.send(200, text)]).url).top_log_probabilities(windows(2))


# Servers that cannot be used


def test_a_model_that_is_not_offered_is_refused_with_those_that_are(imitate):
    with pytest.raises(KdlibError, match=r"must offer the model 'other', got 'tiny', 'large'"):
        CompletionServer(imitate().url, "other", K, TOKENIZER).check()


def test_a_server_that_takes_only_text_is_refused(imitate, waits):
    with pytest.raises(KdlibError, match=r"valid string.*must take token ids.*llama-server"):
        client(imitate(llama_cpp_python).url).check()


def test_texts_that_several_tokens_share_are_refused(model, imitate):
    window = next(
        one for one in windows(*[6] * 50) if {27, 28} & set(top(model, one)[0][-1]) and not {27, 28} & set(one)
    )
    with pytest.raises(KdlibError, match=r"text of more than one token|or use one that returns token ids"):
        client(imitate(sglang).url).top_log_probabilities([window])


def test_a_text_that_no_token_has_is_refused(imitate):
    with pytest.raises(KdlibError, match="with this tokenizer|text of no token"):
        client(imitate(sglang).url, make_tokenizer(["<|end|>", *map(str, range(10)), *TOKENS[11:]])).check()


def test_rows_that_belong_to_other_positions_are_noticed_before_anything_starts(imitate):
    def shift(answer):
        entries = answer["choices"][0]["logprobs"]["top_logprobs"]
        entries[1:-1] = entries[2:]

    with pytest.raises(KdlibError, match=r"one distribution after position.*per_position=True"):
        client(imitate(change=shift).url).check()


def test_probabilities_that_include_the_bias_are_noticed_before_anything_starts(imitate):
    with pytest.raises(KdlibError, match="one distribution after position.*logit_bias"):
        client(imitate(biased).url, per_position=True).check()


def test_probabilities_normalised_over_the_top_k_are_noticed_before_anything_starts(imitate):
    def renormalise(answer):
        for entry in filter(None, answer["choices"][0]["logprobs"]["top_logprobs"]):
            kept = sorted(entry.items(), key=lambda item: -item[1])[:K]
            total = np.logaddexp.reduce([value for _, value in kept])
            entry.clear()
            entry.update({name: value - total for name, value in kept})

    with pytest.raises(KdlibError, match=r"all the mass at every position.*raw_logprobs"):
        client(imitate(change=renormalise).url).check()


def every_entry(function):
    def change(answer):
        for entry in filter(None, answer["choices"][0]["logprobs"]["top_logprobs"]):
            function(entry)

    return change


def of_log_probabilities(**changed):
    return lambda answer: answer["choices"][0]["logprobs"].update(changed)


def drop_least_likely(entry):
    while len(entry) >= K:
        del entry[min(entry, key=entry.get)]


def rename_first(entry, name):
    first = next(iter(entry))
    entry[name] = entry.pop(first)


CHANGES = {
    "fewer than asked": (every_entry(drop_least_likely), rf"{K} log-probabilities, got {K - 1}"),
    "none": (lambda answer: answer["choices"][0].update(logprobs=None), "log-probabilities, got none"),
    "none of the prompt": (of_log_probabilities(tokens=["token_id:1"], top_logprobs=[{}]), "ignores echo"),
    "too many positions": (
        lambda answer: [values.append(values[-1]) for values in answer["choices"][0]["logprobs"].values()],
        "the 6 prompt tokens and one more, got 8",
    ),
    "unequal lists": (of_log_probabilities(top_logprobs=[None]), "must return log-probabilities as"),
    "must return log-probabilities as": (lambda answer: answer["choices"][0].update(logprobs={"values": [1]}), "must return log-probabilities as"),
    "a number missing": (every_entry(lambda entry: entry.update(dict.fromkeys(entry))), "must return log-probabilities as"),
    "other tokens": (of_log_probabilities(tokens=["token_id:1"] * 7), r"must echo its prompt.*with this tokenizer"),
    "a token before the prompt": (lambda answer: answer["usage"].update(prompt_tokens=7), "must count 6 tokens in the prompt, got 7"),
    "ids past the vocabulary": (every_entry(lambda entry: rename_first(entry, "token_id:29")), r"ids in 0\.\.28"),
    "one id twice": (
        every_entry(lambda entry: entry.update({f"token_id:0{name[9:]}": value for name, value in entry.items()})),
        "different token ids",
    ),
    "not a number": (every_entry(lambda entry: entry.update({max(entry, key=entry.get): float("nan")})), "finite"),
    "minus infinity": (every_entry(lambda entry: entry.update(dict.fromkeys(entry, -9999.0))), "finite"),
    "above zero": (every_entry(lambda entry: entry.update({max(entry, key=entry.get): 0.5})), "none above 0"),
    "more than all the mass": (every_entry(lambda entry: entry.update(dict.fromkeys(entry, -0.1))), "above 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_answer_that_cannot_be_used_is_refused(name, imitate):
    change, message = CHANGES[name]
    with pytest.raises(KdlibError, match=message):
        client(imitate(change=change).url).top_log_probabilities(windows(6))


# The key


def test_the_key_is_sent_and_never_told(imitate, monkeypatch):
    monkeypatch.setenv("KDLIB_SERVER_KEY", "sk-secret")
    running = imitate(faults=[lambda handler: handler.send(401, handler.headers["Authorization"].encode())])
    asked = client(running.url)
    with pytest.raises(KdlibError, match="environment variable KDLIB_SERVER_KEY") as raised:
        asked.top_log_probabilities(windows(2))
    assert running.seen[0]["Authorization"] == "Bearer sk-secret"
    assert "sk-secret" not in str(raised.value) + repr(vars(asked)) and "***" in str(raised.value)


def test_without_a_key_no_credentials_of_the_machine_are_sent(imitate, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("KDLIB_SERVER_KEY", raising=False)
    running = imitate()
    client(running.url).check()
    assert all("Authorization" not in headers for headers in running.seen)


# Arguments


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:8000"}, "address like http://"),
        ({"url": "ftp://host"}, "address like http://"),
        ({"url": "http://me:sk-1@host"}, "user name or password"),
        ({"top_k": 0}, "1..28"),
        ({"top_k": 29}, "1..28"),
        ({"timeout": 0}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"in_flight": 0}, "in_flight"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(KdlibError, match=re.escape(message)) as raised:
        client(settings.pop("url", "http://localhost:8000"), **settings)
    assert "sk-1" not in str(raised.value)


@pytest.mark.parametrize("window", [[], [[1, 2]], [1.5], [-1], [29]])
def test_windows_that_are_no_token_ids_are_refused_before_anything_is_sent(window, imitate):
    running = imitate()
    with pytest.raises(KdlibError, match=r"[Ww]indow"):
        client(running.url).top_log_probabilities([np.array([1, 2]), np.array(window)])
    assert running.seen == []
