"""A vLLM server that writes with weights that are lent to it while it runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.engines.decode import Written
from potstill.engines.sampling import Sampling
from potstill.engines.server import ModelServer
from potstill.errors import RefusedError, ServerError

NEVER = -100.0  # what is added to the logit of a token that is not to be drawn: vLLM's least


class LentWeights:
    """The weights of a model, or of a LoRA adapter, behind a server that takes others at any time.

    Whole weights go through vLLM's /collective_rpc (`reload_weights`), which it has with VLLM_SERVER_DEV_MODE=1; the
    server's own name for its weights is set beside, so that others can be told from these. An adapter goes through
    /v1/load_lora_adapter, under a new name each time.

    Args:
        server: a model of the same shape; where adapters are lent, their base.
        adapter: whether they are an adapter's.

    Attributes:
        version: what the weights are called that were lent last; None before.
    """

    def __init__(self, server: ModelServer, *, adapter: bool = False) -> None:
        self.version: str | None = None
        self._server, self._adapter = server, adapter

    def push(self, folder: Path, version: str) -> None:
        """Have the server take the weights in a folder, which it sees under the same path, and go on with them.

        Args:
            folder: what `save_pretrained` wrote.
            version: what they are called from now on; never the same twice.

        Raises:
            RefusedError: the server does not take weights.
            ServerError: it could not.
        """
        ask = self._server.client.ask
        where = str(folder.absolute())
        try:
            if self._adapter:
                lora = {"lora_name": version, "lora_path": where, "load_inplace": True}  # a second attempt may follow
                ask("POST", "/v1/load_lora_adapter", lora, json=False)
            else:
                ask("POST", "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": where}})
                ask("POST", "/update_weight_version", {"new_version": version})
        except RefusedError as error:
            if error.status not in (404, 405):
                raise
            needed = "VLLM_SERVER_DEV_MODE=1"
            if self._adapter:
                needed = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"
            raise RefusedError(
                f"{self._server}: expected a server that takes the student's weights, got one that does not (status "
                f"{error.status}). Start vLLM, 0.32 or later, with {needed}.",
                error.status,
            ) from None
        if self._adapter and self.version is not None:
            with suppress(RefusedError):  # it may be gone
                ask("POST", "/v1/unload_lora_adapter", {"lora_name": self.version}, json=False)
        self.version = version

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        ends: frozenset[int],
        rooms: Sequence[int],
        never: Sequence[int] = (),
    ) -> list[Written]:
        """One continuation of each prompt, in order, as `potstill.engines.decode.write` gives it.

        What a token's distribution gave it is known where that is the model's own (`Sampling.plain`); elsewhere NaN.
        What the model gave it is over all rows of its head, those that are no tokens too.

        Args:
            prompts: token ids, at least one in each.
            sampling: how tokens are drawn; a row's seed is made of its seed and the row's place.
            ends: tokens that end a text.
            rooms: how many tokens each may have at most, >= 1.
            never: tokens that are not drawn.

        Raises:
            RefusedError: the server does not tell which tokens it wrote, or see `JsonClient.ask`.
            ServerError: it wrote with other weights, or see `JsonClient.ask`.
        """
        assert sampling.seed is not None
        # All is said, for vLLM takes what is left out from the model's own generation_config.json.
        options = {
            "model": self.version if self._adapter else self._server.model,
            "temperature": sampling.sampling_temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": sorted(ends),
            "logit_bias": {str(token): NEVER for token in never} or None,
            "logprobs": 0,
            "return_token_ids": True,
            "cache_salt": self.version,  # what it kept of a prompt under other weights is not used
        }
        bodies = [
            {
                **options,
                "prompt": list(prompt),
                "seed": sampling.seed + place,
                "max_tokens": min(room, sampling.max_new_tokens),
            }
            for place, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
        ]
        answers = self._server.client.post_all("/v1/completions", bodies)
        if bodies and not self._adapter:
            self._must_be_ours()
        return [self._written(answer, sampling) for answer in answers]

    def _must_be_ours(self) -> None:
        said = self._server.client.ask("GET", "/weight_info")
        found = said.get("weight_version") if isinstance(said, dict) else said
        if found != self.version:
            raise ServerError(
                f"{self._server}: expected the weights {self.version}, got {found}. It was started again, or another "
                "run lends it weights. Give each run a server of its own, then go on."
            )

    def _written(self, answer: Any, sampling: Sampling) -> Written:
        choice = self._server.choices(answer).get(0, {})
        try:
            ids = [int(token) for token in choice["token_ids"]]
            log_probs = [float(one) for one in choice["logprobs"]["token_logprobs"]]
            if not 0 < len(ids) == len(log_probs):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise RefusedError(
                f"{self._server}: expected token_ids and logprobs of what it wrote, got something else. A student's "
                "texts are learnt from token by token. Serve it with vLLM, 0.32 or later."
            ) from None
        drawn_from = log_probs if sampling.plain else [math.nan] * len(ids)
        return Written(ids, log_probs, drawn_from, choice.get("finish_reason") == "stop")
