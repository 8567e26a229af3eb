"""A completion server as teacher: the top log-probabilities after every position of a prompt, over HTTP.

Two ways to request ``/v1/completions``, both with the prompt as token ids, so that nothing is tokenised twice:

*whole prompt* (``echo`` and ``logprobs``): one request a window. OpenAI's legacy completion format returns, for each
prompt token, the distribution at that token, which is the one *after the token before it*; one generated token adds the
distribution after the last. vLLM answers in this format with ids (``return_tokens_as_token_ids``), SGLang with texts.

*per position*: one request a position, for the distribution of the one token generated after that prefix. Slower, but it
works with any server that takes ids, and one that caches prompts computes each position once. llama.cpp's ``llama-server``
needs this, since it ignores or refuses ``echo``. It also returns nothing for a generated token that is part of a character,
so ``logit_bias`` makes it generate a letter; the distributions it reports are those before the bias.

Not supported, and refused by :meth:`CompletionServer.check`: llama-cpp-python's own server, which takes no ids and, for models without
a BOS token, echoes rows shifted by one position (its issue 1983); ``transformers serve``, which ignores ``logprobs``;
Text Generation Inference, which returns the prompt's own tokens only.

The log-probabilities must be those of the model itself, normalised over its *whole* vocabulary at temperature 1, so that the
remaining mass is 1 - (sum of the top k). vLLM's default ``--logprobs-mode raw_logprobs`` and llama.cpp's default are. This is
checked as far as answers show it: no row may have a mass above 1, and the rows may not all have a mass of exactly 1.
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

from kdlib.cache import answers
from kdlib.cache.answers import KEY_VARIABLE
from kdlib.errors import KdlibError

FIRST_WAIT, LONGEST_WAIT = 0.5, 120.0  # seconds between attempts
ROUNDING = 1e-4  # by which a log-probability may exceed 0, or a row's mass 1
NO_PROBABILITY = -9999.0  # what vLLM writes for minus infinity; llama.cpp writes the lowest float
NO_IDS = "The server must take token ids: use llama.cpp's llama-server with per_position=True, not llama-cpp-python's."
# Share of the top-k mass by which two answers for one position may differ, due to low precision or other kernels.
AGREEMENT = 0.2


class CompletionServer:
    """Client of an OpenAI-compatible completion server.

    An API key is read from the environment variable KDLIB_SERVER_KEY and sent to this server only.

    Args:
        url: of the server, with or without the final ``/v1``.
        model: as the server names it.
        top_k: log-probabilities a position.
        tokenizer: of the served model; its ids are what the windows hold and what comes back.
        per_position: send one request per position (see above).
        timeout: seconds to wait for a connection, and for the server to send something.
        retries: further attempts after a lost connection, a timeout, "too many requests" or a server's own failure.
        in_flight: number of windows requested at once.

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
                f"`url` must not contain a user name or password, since it is logged. Put a key into {KEY_VARIABLE}."
            )
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise KdlibError(f"`url` must be an address like http://localhost:8000, got {answers.short(url)!r}.")
        self.vocabulary = len(tokenizer)
        if not 1 <= top_k < self.vocabulary:
            raise KdlibError(f"`top_k` must be in 1..{self.vocabulary - 1}, below the vocabulary size, got {top_k}.")
        if timeout <= 0 or retries < 0 or in_flight < 1:
            raise KdlibError(
                "`timeout` must be above 0 seconds, `retries` at least 0 and `in_flight` at least 1, got "
                f"timeout={timeout}, retries={retries}, in_flight={in_flight}."
            )
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model, self.top_k, self.per_position = model, top_k, per_position
        self.timeout, self.retries, self.in_flight = timeout, retries, in_flight
        self._tokenizer = tokenizer
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=in_flight))
        # A session without its own `auth` would send the credentials that ~/.netrc has for the host.
        self._session.auth = _authorize

    def require_model(self) -> None:
        """Check that the server offers the model.

        Raises:
            KdlibError: no answer, or a model that is not served.
        """
        offered = [name for entry in answers.field(self._ask("models"), "data", list) for name in answers.names(entry)]
        if self.model not in offered:
            raise self._error(
                f"must offer the model {self.model!r}, got "
                f"{', '.join(map(repr, dict.fromkeys(offered))) or 'none'}. Name one of these."
            )

    def check(self) -> None:
        """Request a few positions, before a long run depends on the server.

        The answer for a position of the whole prompt must agree with the answer to a prompt that ends there: a server with
        shifted rows would otherwise train a student on wrong targets unnoticed. Per position, answers must not depend on the
        generated token.

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
                f"must normalise over the vocabulary, got all the mass at every position for {self.top_k} tokens. Turn off its top-k "
                "and top-p (vLLM: --logprobs-mode raw_logprobs, --generation-config vllm)."
            )

    def _agree(self, last: int, alone: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> None:
        expected, found = (dict(zip(ids.tolist(), np.exp(values), strict=True)) for ids, values in (alone, other))
        different = sum(abs(found.get(i, 0) - expected.get(i, 0)) for i in found.keys() | expected.keys()) / 2
        if different > AGREEMENT * max(sum(found.values()), sum(expected.values())):
            told = (
                "They include logit_bias: use vLLM or llama.cpp"
                if self.per_position
                else "Echoed rows are shifted: use per_position=True"
            )
            raise self._error(
                f"must give one distribution after position {last}, got two, most likely token "
                f"{max(expected, key=expected.get)} and {max(found, key=found.get)}. {told}."
            )

    def top_log_probabilities(self, windows: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
        """The distribution of the token after every position of every window, the last included.

        Args:
            windows: token ids [n] each; the model sees nothing outside its window. One token is generated and dropped, so n must be
                below the server's context length.

        Returns:
            For each window ``ids`` [n, top_k] int64 and ``log_probabilities`` [n, top_k] float32, nats, descending. Row i is
            the distribution of the token after position i.

        Raises:
            KdlibError: the server cannot be reached or refuses (the message has URL, attempts and answer); it returns no
                log-probabilities of the prompt, fewer than ``top_k``, for another number of positions, for tokens other than
                those sent, or for tokens without an id; values that are not finite or above 0; rows with a mass above 1.
        """
        windows = [np.asarray(window) for window in windows]
        for number, window in enumerate(windows):
            if window.ndim != 1 or not len(window) or window.dtype.kind not in "iu":
                raise KdlibError(
                    f"Window {number} must be token ids [n], n > 0, got shape {window.shape} and dtype {window.dtype}."
                )
            if window.min() < 0 or window.max() >= self.vocabulary:
                raise KdlibError(
                    f"Window {number} must have token ids in 0..{self.vocabulary - 1}, got {window.min()}..{window.max()}."
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
                    f"must return log-probabilities of all {len(window)} prompt tokens, got only the generated token's: it "
                    "ignores echo. Use per_position=True."
                )
            if len(entries) != len(window) + 1:
                raise self._error(
                    f"must return log-probabilities of the {len(window)} prompt tokens and one more, got {len(entries)}. It may "
                    "re-tokenise prompts; serve the tokenizer's own model."
                )
            self._compare(window, [token for token, _ in entries])
            rows = [self._row(candidates, position) for position, (_, candidates) in enumerate(entries[1:])]
        return np.stack([row[0] for row in rows]), np.stack([row[1] for row in rows])

    def _after(self, prompt: np.ndarray, generated: int) -> tuple[np.ndarray, np.ndarray]:
        """The distribution after the last token of a prompt; with ``per_position``, the server generates ``generated``."""
        entries = self._complete(prompt, echo=False, **({"logit_bias": {generated: 100}} if self.per_position else {}))
        if len(entries) != 1:
            raise self._error(
                f"must return log-probabilities of one generated token, got {len(entries)} tokens."
            )
        return self._row(entries[0][1], len(prompt) - 1)

    def _complete(self, prompt: np.ndarray, echo: bool, **more: object) -> list[tuple]:
        """(token, its candidates as (token, log-probability) pairs) of each position returned."""
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
        choices = answers.field(answer, "choices", list)
        if len(choices) != 1:
            raise self._error(f"must return one completion, got {len(choices)}.")
        usage = answer.get("usage")
        seen = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if seen not in (None, len(prompt)):
            raise self._error(
                f"must count {len(prompt)} tokens in the prompt, got {seen}. Turn off added tokens (BOS), or use a server that "
                "takes token ids."
            )
        log_probabilities = choices[0].get("logprobs") if isinstance(choices[0], dict) else None
        try:
            entries = answers.entries(log_probabilities)
        except (KeyError, TypeError, ValueError, AttributeError):
            raise self._error(
                "must return log-probabilities as OpenAI's completions (tokens, top_logprobs) or llama.cpp (content), got "
                f"{answers.short(log_probabilities)}."
            ) from None
        if not entries:
            raise self._error(
                f"must return {self.top_k} log-probabilities, got none. Use vLLM, or llama.cpp's llama-server with "
                "per_position=True."
            )
        return entries

    def _row(self, candidates: list[tuple], position: int) -> tuple[np.ndarray, np.ndarray]:
        where = f"must return, after position {position},"
        if len(candidates) < self.top_k:
            raise self._error(
                f"{where} {self.top_k} log-probabilities, got {len(candidates)}. Raise its limit (vLLM: --max-logprobs {self.top_k}), "
                "or use one that returns token ids."
            )
        ids = np.array([self._id(token) for token, _ in candidates], np.int64)
        values = np.array([value for _, value in candidates], np.float64)
        if ids.min() < 0 or ids.max() >= self.vocabulary or len(np.unique(ids)) < len(ids):
            raise self._error(
                f"{where} different token ids in 0..{self.vocabulary - 1}, got {answers.short(ids.tolist())}. Serve a model with this tokenizer."
            )
        # Where the prompt's own token is not among the top_k, the server returns it in addition.
        best = np.argsort(-values, kind="stable")[: self.top_k]
        ids, values = ids[best], values[best]
        if not np.isfinite(values).all() or values[-1] <= NO_PROBABILITY or values[0] > ROUNDING:
            raise self._error(
                f"{where} finite log-probabilities, none above 0, got {values.max()} to {values.min()}. Turn off top_p and vocabulary "
                "masks in its settings."
            )
        mass = np.exp(values).sum()
        if mass > 1 + ROUNDING:
            raise self._error(f"{where} a mass of at most 1, got {mass:.6f}, above 1, for {self.top_k} tokens.")
        return ids, np.minimum(values, 0).astype(np.float32)

    def _compare(self, window: np.ndarray, tokens: list) -> None:
        for position, (sent, token) in enumerate(zip(window.tolist(), tokens, strict=False)):
            # Several tokens may share a text; only a different text is a mismatch.
            if token != (sent if isinstance(token, int) else self._texts[sent]):
                raise self._error(
                    f"must echo its prompt, got {token!r} for token {sent} ({self._texts[sent]!r}) at position {position}. Serve a model with "
                    "this tokenizer, or have token ids returned."
                )

    def _id(self, token: int | str) -> int:
        if isinstance(token, int):
            return token
        found = self._ids.get(token)
        if found is None:
            reason = (
                "no token"
                if token not in self._ids
                else "more than one token"
            )
            raise self._error(
                f"must name tokens uniquely, got {token!r}, the text of {reason}. Use one that returns ids: vLLM, or "
                "llama-server with per_position=True."
            )
        return found

    def _error(self, problem: str) -> KdlibError:
        return KdlibError(f"The server at {self.url} {problem}")

    @cached_property
    def _letters(self) -> list[int]:
        """Ids of two tokens that are whole characters."""
        texts = ((i, self._tokenizer.decode([i])) for i in range(self.vocabulary))
        return list(islice((i for i, text in texts if text.isascii() and text.strip()), 2))

    @cached_property
    def _texts(self) -> list[str]:
        return [self._tokenizer.decode([i]) for i in range(self.vocabulary)]

    @cached_property
    def _ids(self) -> dict[str, int | None]:
        """Maps a text to its token's id, None if several tokens have that text."""
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
                problem = f"{type(error).__name__}: {answers.short(error)}"
            else:
                if response.status_code == 200:
                    return answers.parsed(response, url)
                problem = f"HTTP {response.status_code}: {answers.short(response.text)}"
                if response.status_code != 429 and response.status_code < 500:
                    raise KdlibError(f"The server refused {url}, got {problem}. {_advice(response.status_code)}")
                problem += f". {NO_IDS}" if "valid string" in response.text else ""
                wait = max(wait, _retry_after(response))
            if attempt == self.retries or wait > LONGEST_WAIT:
                break
            sleep(wait)
        raise KdlibError(
            f"The server at {url} must answer in {attempt + 1} attempts of {self.timeout:g} s, got {problem}. Start it, correct `url`, or "
            "raise `timeout` or `retries`."
        )


def _authorize(request: requests.PreparedRequest) -> requests.PreparedRequest:
    if key := os.environ.get(KEY_VARIABLE):
        request.headers["Authorization"] = f"Bearer {key}"
    return request


def _advice(status: int) -> str:
    if status in (401, 403):
        return f"Put its key into the environment variable {KEY_VARIABLE}."
    if status == 404:
        return "Correct the model, or give the address of an OpenAI-compatible server."
    return (
        "Raise its limit of log-probabilities (vLLM: --max-logprobs) or its context, which may be shorter than a window and one token. "
        f"{NO_IDS}"
    )


def _retry_after(response: requests.Response) -> float:
    """Seconds to wait according to the header, a number or a date (RFC 9110, 10.2.3)."""
    value = response.headers.get("Retry-After", "")
    if value.isdigit():
        return float(value)
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (ValueError, TypeError):
        return 0.0
