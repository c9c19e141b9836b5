"""A toy server that takes weights and adapters as vLLM does, and writes with them."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from transformers import LlamaForCausalLM

from conftest import make_llama
from potstill.engines.decode import generate_tokens
from potstill.engines.sampling import Sampling
from potstill.train.server_writer import token_log_probs
from toy_server import ToyServer


class ToyStudentServer(ToyServer):
    """Serves random weights, under the name "toy", until it is sent others.

    Args:
        tokenizer: how the server reads token ids.
        model: whose shape it serves; default: a student's.
    """

    def __init__(self, tokenizer: Any, model: Any = None) -> None:
        super().__init__(model if model is not None else make_llama(hidden_size=8, layers=1, seed=9), tokenizer)
        self.version = "default"
        self.takes = True  # False: without VLLM_SERVER_DEV_MODE and VLLM_ALLOW_RUNTIME_LORA_UPDATING
        self.ignores_weights = False  # True: it reports that it loaded weights, and did not
        self.received: list[Any] = []  # all models that it was sent
        self.adapters: dict[str, Any] = {}

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/weight_info" and self.takes:
            return 200, {"weight_version": self.version}
        if path == "/update_weight_version" and self.takes:
            self.version = body["new_version"]
            return 200, {"success": True}
        if path == "/collective_rpc" and self.takes:
            assert body["method"] == "reload_weights"
            if not self.ignores_weights:
                self.model = LlamaForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
            self.received.append(self.model)
            return 200, {"results": [None]}
        if path == "/v1/load_lora_adapter" and self.takes:
            base = type(self.model)(self.model.config)
            base.load_state_dict(self.model.state_dict())
            self.adapters[body["lora_name"]] = PeftModel.from_pretrained(base, body["lora_path"]).eval()
            self.received.append(self.adapters[body["lora_name"]])
            return 200, b"Success: the adapter is loaded or unloaded."
        if path == "/v1/unload_lora_adapter" and self.takes:
            del self.adapters[body["lora_name"]]
            return 200, b"Success: the adapter is loaded or unloaded."
        if path == "/v1/completions" and "return_token_ids" in body:
            return self.write(body)
        return super().answer(path, body)

    def write(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = self.model if body["model"] == self.name else self.adapters.get(body["model"])
        if model is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        sampling = Sampling(
            max_new_tokens=body["max_tokens"],
            sampling_temperature=body["temperature"],
            top_p=body["top_p"],
            top_k=body["top_k"],
            seed=body["seed"],
        )
        never = min(map(int, body["logit_bias"] or {}), default=None)
        ends = frozenset(body["stop_token_ids"])
        with self.lock:
            (text,) = generate_tokens(model, [body["prompt"]], sampling, eos_ids=ends, vocabulary=never)
            log_probs = token_log_probs(
                model, body["prompt"], text.ids
            ).tolist()  # over all rows of its head, as vLLM's are
        extra = {"token_ids": text.ids, "logprobs": {"token_logprobs": log_probs}}
        return 200, {
            "choices": [{"index": 0, "text": "", "finish_reason": "stop" if text.ended else "length", **extra}]
        }
