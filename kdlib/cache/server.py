"""A completion server as teacher: the top log-probabilities after every position of a prompt, over HTTP.

Two ways to ask ``/v1/completions``, both with the prompt as token ids, so that nothing is tokenised twice:

*whole prompt* (``echo`` and ``logprobs``): one request a window. OpenAI's old completion format gives, beside each prompt
token, the distribution it was drawn from, which is the one *after the token before it*; one generated token adds the
distribution after the last. vLLM answers so, with ids (``return_tokens_as_token_ids``); SGLang, with texts.

*per position*: one request a position, for the distribution of the one token generated after that prefix. Slower, but any
server that takes ids can answer, and one that caches prompts computes each position once. llama.cpp's ``llama-server`` needs
this: it ignores or refuses ``echo``. It also says nothing of a generated token that is part of a character, so ``logit_bias``
makes it generate a letter; the distributions it reports are those before the bias.

Unfit, and refused by :meth:`CompletionServer.check`: llama-cpp-python's own server, which takes no ids and, for models without
a BOS token, echoes rows shifted by one position (its issue 1983); ``transformers serve``, which ignores ``logprobs``;
Text Generation Inference, which returns the prompt's own tokens only.

The log-probabilities are taken to be those of the model itself, normalised over its *whole* vocabulary at temperature 1, so
that the mass left over is log(1 - sum of the kept). vLLM's default ``--logprobs-mode raw_logprobs`` and llama.cpp's default
are. What can be seen from outside is checked: no row may hold more than all the mass, nor may all hold exactly all of it.
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from itertools import islice
from time import sleep
from urllib.parse import urlsplit

import numpy as np
import requests
from transformers import PreTrainedTokenizerBase

from kdlib.errors import KdlibError

KEY_VARIABLE = "KDLIB_SERVER_KEY"
FIRST_WAIT, LONGEST_WAIT = 0.5, 120.0  # seconds between attempts
ROUNDING = 1e-4  # by which a log-probability may exceed 0, or a row's mass 1
NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity; llama.cpp writes the lowest float
NO_IDS = "A server that wants its prompt as a string (llama-cpp-python's) is of no use; llama.cpp's llama-server is, with per_position=True."
# Share of the kept mass by which two answers about one position may differ: low precision and other kernels, not another position.
AGREEMENT = 0.2


class CompletionServer:
    """Client of an OpenAI-compatible completion server.

    An API key, if the server wants one, is read from the environment variable KDLIB_SERVER_KEY and told to nobody else.

    Args:
        url: of the server, with or without the final ``/v1``.
        model: as the server names it.
        top_k: log-probabilities a position.
        tokenizer: of the served model; its ids are what the windows hold and what comes back.
        per_position: ask for one position at a time (see above).
        timeout: seconds to wait for a connection, and for the server to send something.
        retries: further attempts after a lost connection, a timeout, "too many requests" or a server's own failure.
        in_flight: windows asked for at once.

    Raises:
        KdlibError: a value out of range, or a URL that is not plain http(s).
    """

    def __init__(
        self,
        url: str,
        model: str,
        top_k: int,
        tokenizer: PreTrainedTokenizerBase,
        per_position: bool = False,
        timeout: float = 120.0,
        retries: int = 5,
        in_flight: int = 4,
    ):
        parts = urlsplit(url)
        if "@" in parts.netloc:
            raise KdlibError(
                f"The server's address holds a user name or password, which would end up in logs. Put a key into {KEY_VARIABLE}."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise KdlibError(f"Expected a server's address like http://localhost:8000, found {_short(url)!r}.")
        self.vocabulary = len(tokenizer)
        if not 1 <= top_k < self.vocabulary:
            raise KdlibError(f"top_k must lie in 1..{self.vocabulary - 1}, below the vocabulary; found {top_k}.")
        if timeout <= 0 or retries < 0 or in_flight < 1:
            raise KdlibError(
                "Expected a timeout above 0 seconds, 0 or more retries and 1 or more windows in flight; found "
                f"timeout={timeout}, retries={retries}, in_flight={in_flight}."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.top_k, self.per_position = model, top_k, per_position
        self.timeout, self.retries, self.in_flight = timeout, retries, in_flight
        self._tokenizer = tokenizer
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=in_flight))
        # A session without an `auth` of its own would send what ~/.netrc holds for the host.
        self._session.auth = _authorize

    def require_model(self) -> None:
        """Ask which models there are.

        Raises:
            KdlibError: no answer, or a model that is not served.
        """
        offered = [name for entry in _get(self._ask("models"), "data", list) for name in _names(entry)]
        if self.model not in offered:
            raise self._error(
                f"does not offer the model {self.model!r}; it offers "
                f"{', '.join(map(repr, dict.fromkeys(offered))) or 'none'}. Name one of these."
            )

    def check(self) -> None:
        """Ask for a few positions, before anything that takes long depends on the server.

        What the whole prompt's answer says of a position must agree with the answer to a prompt that ends there: a server whose
        rows are shifted would train a student on wrong targets without any other sign. Per position, answers must not depend on
        the token that is generated.

        Raises:
            KdlibError: no answer, a model that is not served, or answers that cannot be used (see
                :meth:`top_log_probabilities`).
        """
        self.require_model()
        probe = np.arange(1, 9) * self.vocabulary // 10
        ids, log_probabilities = self._window(probe)
        for last in (2, 5):
            self._agree(last, self._after(probe[: last + 1], self._letters[1]), (ids[last], log_probabilities[last]))
        mass = np.exp(log_probabilities.astype(np.float64)).sum(1)
        if mass.min() > 1 - 1e-6:
            raise self._error(
                f"gives its {self.top_k} log-probabilities all the mass at every position, so they seem to "
                f"be normalised over these {self.top_k} and not over the vocabulary. Turn off top-k and top-p in the server's own "
                "settings (vLLM: --logprobs-mode raw_logprobs, --generation-config vllm)."
            )

    def _agree(self, last: int, alone: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
        expected, found = (dict(zip(ids.tolist(), np.exp(values), strict=True)) for ids, values in (alone, other))
        different = sum(abs(found.get(i, 0) - expected.get(i, 0)) for i in found.keys() | expected.keys()) / 2
        if different > AGREEMENT * max(sum(found.values()), sum(expected.values())):
            told = (
                "its log-probabilities include logit_bias. Use a server that reports the model's own (vLLM, llama.cpp)"
                if self.per_position
                else "its echoed log-probabilities belong to other positions. Ask with per_position=True"
            )
            raise self._error(
                f"contradicts itself about the token after position {last}: most likely is token "
                f"{max(expected, key=expected.get)} in one answer and {max(found, key=found.get)} in another, so {told}."
            )

    def top_log_probabilities(self, windows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The distribution of the token after every position of every window, the last included.

        Args:
            windows: token ids [n] each; the model sees nothing outside its window. One token is generated (and dropped), so n must
                stay below the server's context length.

        Returns:
            For each window ``ids`` [n, top_k] int64 and ``log_probabilities`` [n, top_k] float32, nats, descending. Row i is
            the distribution of the token after position i.

        Raises:
            KdlibError: the server cannot be reached or refuses (which URL, how often, what it said); it returns no
                log-probabilities of the prompt, fewer than ``top_k``, for another number of positions, or of tokens that are not
                those that were sent or that no token id can be found for; values that are not finite or above 0; rows with
                more than all the mass.
        """
        windows = [np.asarray(window) for window in windows]
        for number, window in enumerate(windows):
            if window.ndim != 1 or not len(window) or window.dtype.kind not in "iu":
                raise KdlibError(
                    f"Expected windows of token ids [n], n > 0; window {number} has shape {window.shape} and dtype {window.dtype}."
                )
            if window.min() < 0 or window.max() >= self.vocabulary:
                raise KdlibError(
                    f"Window {number} holds the token ids {window.min()}..{window.max()}; the tokenizer has 0..{self.vocabulary - 1}."
                )
        with ThreadPoolExecutor(self.in_flight) as pool:
            return list(pool.map(self._window, windows))

    def _window(self, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.per_position:
            rows = [self._after(window[:end], self._letters[0]) for end in range(1, len(window) + 1)]
        else:
            entries = self._complete(window, echo=True)
            if len(entries) == 1:
                raise self._error(
                    f"ignores echo: for a prompt of {len(window)} tokens it returned log-probabilities of the "
                    "generated token only. Ask with per_position=True, which needs one request a position."
                )
            if len(entries) != len(window) + 1:
                raise self._error(
                    f"returned log-probabilities of {len(entries)} tokens; expected {len(window) + 1}, those of "
                    f"the prompt's {len(window)} tokens and one more. It may tokenise prompts anew; serve the tokenizer's own model."
                )
            self._compare(window, [token for token, _ in entries])
            rows = [self._row(candidates, position) for position, (_, candidates) in enumerate(entries[1:])]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def _after(self, prompt: np.ndarray, generated: int) -> tuple[np.ndarray, np.ndarray]:
        """The distribution after the last token of a prompt; per position, ``generated`` is what the server then generates."""
        entries = self._complete(prompt, echo=False, **({"logit_bias": {generated: 100}} if self.per_position else {}))
        if len(entries) != 1:
            raise self._error(
                f"returned log-probabilities of {len(entries)} tokens; expected those of one generated token."
            )
        return self._row(entries[0][1], len(prompt) - 1)

    def _complete(self, prompt: np.ndarray, echo: bool, **more: object) -> list[tuple]:
        """(token, its candidates as (token, log-probability) pairs) of each position that the server returned."""
        request = {
            "model": self.model,
            "prompt": prompt.tolist(),
            "max_tokens": 1,
            "logprobs": self.top_k,
            "echo": echo,
            "temperature": 1.0,
            "top_p": 1.0,
            "return_tokens_as_token_ids": True,
            **more,
        }
        answer = self._ask("completions", request)
        choices = _get(answer, "choices", list)
        if len(choices) != 1:
            raise self._error(f"returned {len(choices)} completions; expected one.")
        usage = answer.get("usage")
        seen = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if seen not in (None, len(prompt)):
            raise self._error(
                f"counts {seen} tokens in a prompt of {len(prompt)}: it adds tokens or tokenises anew, so its "
                "answer is about another text. Turn that off (a BOS token that is added), or use a server that takes token ids."
            )
        log_probabilities = choices[0].get("logprobs") if isinstance(choices[0], dict) else None
        try:
            entries = _entries(log_probabilities)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._error(
                f"returned log-probabilities in an unknown format: {_short(log_probabilities)}. Expected those of "
                "OpenAI's completions (tokens, top_logprobs) or of llama.cpp (content)."
            ) from None
        if not entries:
            raise self._error(
                f"returned no log-probabilities although {self.top_k} were asked for. Serve the model with vLLM, "
                "or with llama.cpp's llama-server and per_position=True."
            )
        return entries

    def _row(self, candidates: list[tuple], position: int) -> tuple[np.ndarray, np.ndarray]:
        where = f"returned, for the token after position {position},"
        if len(candidates) < self.top_k:
            raise self._error(
                f"{where} {len(candidates)} log-probabilities; {self.top_k} were asked for. Servers limit them (vLLM: --max-logprobs "
                f"{self.top_k}), and those that name tokens by text merge tokens of one text: ask for fewer, or use one that gives ids."
            )
        ids = np.array([self._id(token) for token, _ in candidates], np.int64)
        values = np.array([value for _, value in candidates], np.float64)
        if ids.min() < 0 or ids.max() >= self.vocabulary or len(np.unique(ids)) < len(ids):
            raise self._error(
                f"{where} the token ids {_short(ids.tolist())}; expected different ids in 0..{self.vocabulary - 1}. It serves a model "
                "with another tokenizer."
            )
        # Where the prompt's own token is not among the top_k it comes on top of them.
        best = np.argsort(-values, kind="stable")[: self.top_k]
        ids, values = ids[best], values[best]
        if not np.isfinite(values).all() or values[-1] <= NO_PROBABILITY or values[0] > ROUNDING:
            raise self._error(
                f"{where} log-probabilities from {values.max()} to {values.min()}; expected finite ones, none above 0. Its model or its "
                "sampling settings (a masked vocabulary, a top_p) are at fault."
            )
        mass = np.exp(values).sum()
        if mass > 1 + ROUNDING:
            raise self._error(f"{where} {self.top_k} log-probabilities that sum to a mass of {mass:.6f}, above 1.")
        return ids, np.minimum(values, 0).astype(np.float32)

    def _compare(self, window: np.ndarray, tokens: list) -> None:
        for position, (sent, token) in enumerate(zip(window.tolist(), tokens, strict=False)):
            # Several tokens may share a text, which does not matter here: only a different text is a mismatch.
            if token != (sent if isinstance(token, int) else self._texts[sent]):
                raise self._error(
                    f"read another prompt than it was sent: token {sent} ({self._texts[sent]!r}) at position "
                    f"{position} came back as {token!r}. It serves a model with another tokenizer, or names tokens by text and writes "
                    "parts of characters in its own way: then use a server that gives token ids."
                )

    def _id(self, token: int | str) -> int:
        if isinstance(token, int):
            return token
        found = self._ids.get(token)
        if found is None:
            reason = (
                "no token of the tokenizer"
                if token not in self._ids
                else "more than one token (parts of characters, often)"
            )
            raise self._error(
                f"names a token {token!r}, the text of {reason}, so its id cannot be told. Use a server that "
                "gives token ids: vLLM, or llama.cpp's llama-server with per_position=True."
            )
        return found

    def _error(self, problem: str) -> KdlibError:
        return KdlibError(f"The server at {self.url} {problem}")

    @cached_property
    def _letters(self) -> list[int]:
        """Two tokens of whole characters."""
        texts = ((i, self._tokenizer.decode([i])) for i in range(self.vocabulary))
        return list(islice((i for i, text in texts if text.isascii() and text.strip()), 2))

    @cached_property
    def _texts(self) -> list[str]:
        return [self._tokenizer.decode([i]) for i in range(self.vocabulary)]

    @cached_property
    def _ids(self) -> dict[str, int | None]:
        """Text -> its token's id, None where several tokens have that text."""
        ids = {}
        for i, text in enumerate(self._texts):
            ids[text] = None if text in ids else i
        return ids

    def _ask(self, path: str, body: dict | None = None) -> dict:
        url = f"{self.url}/v1/{path}"
        for attempt in range(self.retries + 1):
            wait = FIRST_WAIT * 2**attempt
            try:
                response = self._session.request(
                    "GET" if body is None else "POST", url, json=body, timeout=self.timeout, allow_redirects=False
                )
            except requests.RequestException as error:
                problem = f"{type(error).__name__}: {_short(error)}"
            else:
                if response.status_code == 200:
                    return _parsed(response, url)
                problem = f"HTTP {response.status_code}: {_short(response.text)}"
                if response.status_code != 429 and response.status_code < 500:
                    raise KdlibError(f"The server refused {url} ({problem}). {_advice(response.status_code)}")
                problem += f". {NO_IDS}" if "valid string" in response.text else ""
                wait = max(wait, _retry_after(response))
            if attempt == self.retries or wait > LONGEST_WAIT:
                break
            sleep(wait)
        raise KdlibError(
            f"The server at {url} gave no answer in {attempt + 1} attempts of up to {self.timeout:g} s each; the last one: {problem}. Start "
            "it, correct the address, or allow more time (timeout, retries). Finished work is kept, so the same command goes on."
        )


def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
    if key := os.environ.get(KEY_VARIABLE):
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"It wants a key: put it into the environment variable {KEY_VARIABLE}."
    if status == 404:
        return "It has no such address or no such model: give the address of an OpenAI-compatible server."
    return (
        "It may allow fewer log-probabilities (vLLM: --max-logprobs) or have a shorter context than a window and one token. "
        f"{NO_IDS}"
    )


def _retry_after(response: requests.Response) -> float:
    """Seconds that the server asks to wait; the header holds a number or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0


def _parsed(response: requests.Response, url: str) -> dict:
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise KdlibError(
            f"The answer of {url} is not a JSON object: {_short(response.text)}. Give the address of an OpenAI-compatible server."
        )
    return answer


def _get(answer: dict, key: str, kind: type):
    if not isinstance(answer.get(key), kind):
        raise KdlibError(
            f"The server's answer lacks a {kind.__name__} {key!r}: {_short(answer)}. It is not OpenAI-compatible."
        )
    return answer[key]


def _names(entry: dict) -> list[str]:
    return [entry["id"], *entry.get("aliases", [])] if isinstance(entry, dict) and "id" in entry else []


def _entries(log_probabilities: dict | None) -> list[tuple]:
    if not log_probabilities:
        return []
    if "content" in log_probabilities:  # llama.cpp: the format of chat completions, with ids
        return [
            (int(entry["id"]), [(int(one["id"]), float(one["logprob"])) for one in entry["top_logprobs"]])
            for entry in log_probabilities["content"] or []
        ]
    candidates = [
        [(_token(token), float(value)) for token, value in (one or {}).items()]
        for one in log_probabilities["top_logprobs"] or []
    ]
    return list(zip(map(_token, log_probabilities["tokens"]), candidates, strict=True))


def _token(name: str) -> int | str:
    """The id in vLLM's ``token_id:17``, or the text itself."""
    number = name.removeprefix("token_id:")
    return int(number) if number != name and number.isdigit() else name


def _short(value: object) -> str:
    text = " ".join(str(value).split())
    key = os.environ.get(KEY_VARIABLE)
    return (text.replace(key, "***") if key else text)[:300]
