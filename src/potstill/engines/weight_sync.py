"""Weight synchronisation: push a student's weights to a running vLLM server, and generate with them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.engines.decode import GeneratedTokens
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.errors import RefusedError, ServerError

EXCLUDED_LOGIT_BIAS = -100.0  # vLLM's minimum


class WeightSync:
    """A vLLM server whose weights, or LoRA adapter, are replaced while it runs.

    Full weights go through /collective_rpc (`reload_weights`), available with VLLM_SERVER_DEV_MODE=1; their version is
    set on the server, to notice weights of another run. An adapter goes through /v1/load_lora_adapter, under a new name
    each time.

    The server has a model of the student's shape; for adapters, their base.
    """

    def __init__(self, server: ModelServer, *, adapter: bool = False) -> None:
        self.version: str | None = None  # name of the weights that were pushed last
        self._server, self._adapter = server, adapter

    def push(self, folder: Path, version: str) -> None:
        """Load the weights that `save_pretrained` wrote to a folder, which the server sees under the same path."""
        request, path = self._server.client.request, str(folder.absolute())
        try:
            if self._adapter:
                lora = {"lora_name": version, "lora_path": path, "load_inplace": True}  # so that a retry succeeds
                request("POST", "/v1/load_lora_adapter", lora, json=False)
            else:
                request("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
                request("POST", "/update_weight_version", {"new_version": version})
        except RefusedError as error:
            if error.status not in (404, 405):
                raise
            lora_flags = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            message = (
                f"{self._server}: expected a server that takes the student's weights, got one that does not (status "
                f"{error.status}). Start vLLM, 0.32 or later, with "
                f"{lora_flags if self._adapter else 'VLLM_SERVER_DEV_MODE=1'}."
            )
            raise RefusedError(message, error.status) from None
        if self._adapter and self.version is not None:
            with suppress(RefusedError):  # it may be gone
                request("POST", "/v1/unload_lora_adapter", {"lora_name": self.version}, json=False)
        self.version = version

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        eos_ids: frozenset[int],
        max_tokens: Sequence[int],
        excluded: Sequence[int] = (),
    ) -> list[GeneratedTokens]:
        """Generate one continuation of each prompt, in order, as `decode.generate_tokens` does.

        `sampler_log_probs` are known for the model's own distribution (`Sampling.plain`), NaN for any other.
        `log_probs` are over all rows of the model's head, padding rows too. A row's seed is `sampling.seed` plus the
        row's index; `excluded` tokens are never drawn.
        """
        assert sampling.seed is not None
        # Every option is given: vLLM takes missing ones from the model's generation_config.json.
        options = {
            "model": self.version if self._adapter else self._server.model,
            "temperature": sampling.sampling_temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(eos_ids),
            "logit_bias": {str(token): EXCLUDED_LOGIT_BIAS for token in excluded} or None,
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": self.version,  # prefixes that were cached under other weights are not used
        }
        rows = [
            {"prompt": list(prompt), "seed": sampling.seed + i, "max_tokens": min(limit, sampling.max_new_tokens)}
            for i, (prompt, limit) in enumerate(zip(prompts, max_tokens, strict=True))
        ]
        answers = self._server.client.post_all("/v1/completions", [options | row for row in rows])
        if rows and not self._adapter:
            info = self._server.client.request("GET", "/weight_info")
            version = info.get("weight_version") if isinstance(info, dict) else info
            if version != self.version:
                raise ServerError(
                    f"{self._server}: expected the weights {self.version}, got {version}. The server was started "
                    "again, or another run pushes weights to it: give each run a server of its own, then resume."
                )
        return [self._parse(answer, sampling) for answer in answers]

    def _parse(self, answer: Any, sampling: Sampling) -> GeneratedTokens:
        choice = self._server.choices(answer).get(0, {})
        try:
            ids = [int(token) for token in choice["token_ids"]]
            log_probs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            if not 0 < len(ids) == len(log_probs):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise RefusedError(
                f"{self._server}: expected token_ids and logprobs of the generated tokens, got something else. Serve "
                "the student with vLLM, 0.32 or later."
            ) from None
        sampler_log_probs = log_probs if sampling.plain else [math.nan] * len(ids)
        return GeneratedTokens(ids, log_probs, sampler_log_probs, choice.get("finish_reason") == "stop")
