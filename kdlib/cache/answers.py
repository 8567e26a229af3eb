"""What the answer of a completion server says, in either of the formats that servers use."""

import os

import requests

from kdlib.errors import KdlibError

KEY_VARIABLE = "KDLIB_SERVER_KEY"


def parsed(response: requests.Response, url: str) -> dict:
    """The JSON object of an answer.

    Raises:
        KdlibError: it is none.
    """
    try:
        answer = response.json()
    except ValueError:
        answer = None
    if not isinstance(answer, dict):
        raise KdlibError(
            f"The answer of {url} must be a JSON object, got {short(response.text)}. Give the address of an OpenAI-compatible server."
        )
    return answer


def field(answer: dict, key: str, expected: type):
    """A field of an answer, of the expected type.

    Raises:
        KdlibError: it is missing or of another type.
    """
    if not isinstance(answer.get(key), expected):
        raise KdlibError(
            f"The server's answer must have a {expected.__name__} {key!r}, got {short(answer)}. Use an OpenAI-compatible server."
        )
    return answer[key]


def names(entry: dict) -> list[str]:
    """The names of a model in the list of models."""
    return [entry["id"], *entry.get("aliases", [])] if isinstance(entry, dict) and "id" in entry else []


def entries(log_probabilities: dict | None) -> list[tuple]:
    """Per position (token, [(token, log-probability)]), from the completion or the chat format; [] for none."""
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


def short(value: object) -> str:
    """The beginning of a text for a message, without the key."""
    text = " ".join(str(value).split())
    key = os.environ.get(KEY_VARIABLE)
    return (text.replace(key, "***") if key else text)[:300]
