"""Other engines on a GGUF file: llama.cpp, and transformers with the file's own weights.

``tools/prove_models.py`` runs this in the environment that holds them, one process an engine:
``python prove_models_engines.py ENGINE JOBS.json``. A job has

- ``file`` and ``out``, an .npz to write;
- ``ids``, a text's tokens, and ``keep``: the logits of its last positions go to ``logits``;
- ``prompt`` and ``count``: the tokens that greedy decoding appends go to ``greedy``;
- ``windows``, sequences of tokens: the sum of -ln p of all but their first goes to ``nll``;
- ``save``: a folder for transformers to write its model into;
- ``texts``: llama.cpp's tokens of each go to ``tokens``, flat, and their counts to ``counts``;
- ``context``: what llama.cpp is told to make room for (it picks phi3's rope factors by it);
- ``rope``: rope's parameters as transformers names them, where the file has only their result.

Nothing of edgemoa is used here: neither its reader nor its graphs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Engine(Protocol):
    """A loaded model."""

    def logits(self, ids: list[int]) -> np.ndarray:
        """float32 [tokens, vocabulary] of one sequence."""

    def tokens(self, text: str) -> list[int]:
        """As a document's beginning is not marked, special tokens recognized."""

    def save(self, folder: str) -> None:
        """Write the model as a folder of the hub's kind, without a tokenizer."""


class LlamaCpp:
    """llama.cpp through its Python package: a float32 cache, no flash attention."""

    def __init__(self, job: dict[str, Any]) -> None:
        import llama_cpp  # noqa: PLC0415 - each engine has a process and a package of its own

        context = job.get("context", 512)
        self._model = llama_cpp.Llama(
            job["file"], n_ctx=context, n_batch=context, n_ubatch=context, n_threads=2,
            logits_all=True, verbose=False, type_k=0, type_v=0, flash_attn=False,
        )  # fmt: skip

    def logits(self, ids: list[int]) -> np.ndarray:
        self._model.reset()
        self._model.eval(ids)
        return np.array(self._model.scores[: len(ids)])

    def tokens(self, text: str) -> list[int]:
        found: list[int] = self._model.tokenize(text.encode(), add_bos=False, special=True)
        return found

    def save(self, folder: str) -> None:
        raise NotImplementedError


class Transformers:
    """The model class that the weights were made for, filled from the GGUF file."""

    def __init__(self, job: dict[str, Any]) -> None:
        import gguf  # noqa: PLC0415
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415

        torch.set_num_threads(2)
        self._torch = torch
        reader = gguf.GGUFReader(job["file"])
        tensors = {
            t.name: gguf.quants.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist())
            for t in reader.tensors
        }
        architecture = str(reader.fields["general.architecture"].contents())
        keys = {
            name.removeprefix(f"{architecture}."): entry.contents()
            for name, entry in reader.fields.items()
        }
        kind, settings = _config(architecture, keys, tensors, job.get("rope"))
        config = getattr(transformers, f"{kind}Config")(**settings)
        config._attn_implementation = "eager"
        classes = {"Gemma3Text": "Gemma3ForCausalLM"}
        self._model = getattr(transformers, classes.get(kind, f"{kind}ForCausalLM"))(config).eval()
        state = {name: torch.from_numpy(v) for name, v in _state(architecture, keys, tensors)}
        missing, unknown = self._model.load_state_dict(state, strict=False)
        missing = [n for n in missing if not (n == "lm_head.weight" and config.tie_word_embeddings)]
        if missing or unknown:
            raise ValueError(f"missing {missing}, unknown {unknown}")
        self._model.tie_weights()

    def logits(self, ids: list[int]) -> np.ndarray:
        with self._torch.inference_mode():
            found = self._model(self._torch.tensor([ids]), use_cache=False).logits[0]
        return np.asarray(found.float().numpy())

    def tokens(self, text: str) -> list[int]:
        raise NotImplementedError

    def save(self, folder: str) -> None:
        self._model.save_pretrained(folder)


def _config(
    architecture: str, keys: dict[str, Any], tensors: dict[str, Any], rope: dict[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """The name of the configuration's class, and what it is made of."""
    heads, hidden = keys["attention.head_count"], keys["embedding_length"]
    size = keys.get("attention.key_length", hidden // heads)
    base = {"rope_type": "default", "rope_theta": keys["rope.freq_base"]}
    if keys.get("rope.scaling.type") == "linear":
        base |= {"rope_type": "linear", "factor": keys["rope.scaling.factor"]}
    settings: dict[str, Any] = {
        "vocab_size": len(tensors["token_embd.weight"]),
        "hidden_size": hidden,
        "intermediate_size": keys["feed_forward_length"],
        "num_hidden_layers": keys["block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": keys["attention.head_count_kv"],
        "max_position_embeddings": keys["context_length"],
        "rms_norm_eps": keys["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "output.weight" not in tensors,
        "rope_parameters": base | (rope or {}),
        "pad_token_id": None, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    window = keys.get("attention.sliding_window")
    if architecture in {"llama", "qwen3"}:
        settings["head_dim"] = size
    if architecture == "gemma3":
        local = {"rope_type": "default", "rope_theta": keys.get("rope.freq_base_swa", 10000.0)}
        settings |= {
            "head_dim": size,
            "query_pre_attn_scalar": size,
            "sliding_window": window,
            "rope_parameters": {"full_attention": base, "sliding_attention": local},
        }
    if architecture == "phi3":
        settings["sliding_window"] = window or None
        settings["rope_parameters"]["partial_rotary_factor"] = keys["rope.dimension_count"] / size
        if "rope_factors_long.weight" in tensors:
            original = keys["rope.scaling.original_context_length"]
            settings["original_max_position_embeddings"] = original
            settings["rope_parameters"] |= {
                "rope_type": "longrope",
                "original_max_position_embeddings": original,
                "long_factor": tensors["rope_factors_long.weight"].tolist(),
                "short_factor": tensors["rope_factors_short.weight"].tolist(),
            }
    names = {"gemma3": "Gemma3Text"}
    return names.get(architecture, architecture.capitalize()), settings


PLACES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PLACES_GEMMA3 = PLACES | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
PLACES_PHI3 = PLACES | {"ffn_up": "mlp.gate_up_proj"}
OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}


def _state(architecture: str, keys: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """Tensors by transformers' names, with what the converter did to them undone."""
    places = {"gemma3": PLACES_GEMMA3, "phi3": PLACES_PHI3}.get(architecture, PLACES)
    for name, value in tensors.items():
        if name.startswith("rope"):
            continue
        if architecture == "gemma3" and "norm" in name:
            value = value - 1  # noqa: PLW2901 - transformers adds it while running
        if name in OUTER:
            yield OUTER[name], value
            continue
        _, number, part, ending = name.split(".")
        if architecture == "llama" and part in {"attn_q", "attn_k"}:
            # Rows as pairs of neighbours, back to a head's two halves.
            heads = keys["attention.head_count" if part == "attn_q" else "attention.head_count_kv"]
            pairs = value.reshape(heads, -1, 2, value.shape[-1])
            value = pairs.swapaxes(1, 2).reshape(value.shape)  # noqa: PLW2901
        yield f"model.layers.{number}.{places[part]}.{ending}", value


ENGINES: dict[str, Callable[[dict[str, Any]], Engine]] = {
    "llama.cpp": LlamaCpp,
    "transformers": Transformers,
}


def _negative_log_likelihood(logits: np.ndarray, targets: list[int]) -> float:
    logits = logits.astype(np.float64)
    highest = logits.max(-1, keepdims=True)
    partition = np.log(np.exp(logits - highest).sum(-1)) + highest[:, 0]
    return float((partition - logits[np.arange(len(targets)), targets]).sum())


def run(engine: Engine, job: dict[str, Any]) -> dict[str, Any]:
    """Everything that the job asks for."""
    found: dict[str, Any] = {}
    if "ids" in job:
        found["logits"] = engine.logits(job["ids"])[-job["keep"] :]
    if "save" in job:
        engine.save(job["save"])
    if "prompt" in job:
        text = list(job["prompt"])
        for _ in range(job["count"]):
            text.append(int(engine.logits(text)[-1].argmax()))
        found["greedy"] = text[-job["count"] :]
    if "windows" in job:
        found["nll"] = sum(
            _negative_log_likelihood(engine.logits(ids[:-1]), ids[1:]) for ids in job["windows"]
        )
    if "texts" in job:
        tokens = [engine.tokens(text) for text in job["texts"]]
        found["tokens"] = [token for text in tokens for token in text]
        found["counts"] = [len(text) for text in tokens]
    return found


def main() -> None:
    """Do the jobs; a line of output for each, for progress."""
    engine, jobs = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
    for job in jobs:
        np.savez(job["out"], **run(ENGINES[engine](job), job))
        print(job["out"], flush=True)


if __name__ == "__main__":
    main()
