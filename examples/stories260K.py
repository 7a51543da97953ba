"""Makes the folder stories260K: a tiny model that tells stories, which the docs and notebooks use.

    hf download karpathy/tinyllamas --include "stories260K/*" --local-dir tinyllamas
    python examples/stories260K.py tinyllamas/stories260K stories260K

That repository (MIT) has the files of llama2.c; a Hugging Face folder is made of two of them, the
weights stories260K.bin and the vocabulary tok512.bin. PyTorch is not needed.
"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SPACE = "\u2581"  # how the vocabulary writes one


def read_weights(file: Path) -> tuple[dict[str, int], dict[str, np.ndarray]]:
    """The sizes, and the tensors by Hugging Face's names, float32; a head is the embedding."""
    names = ("width", "mlp", "layers", "heads", "kv_heads", "vocab", "positions")
    size = dict(zip(names, struct.unpack("<7i", file.read_bytes()[:28])))
    values = np.fromfile(file, np.float32, offset=28)
    head, place, found = size["width"] // size["heads"], 0, {}

    def take(name: str, *shape: int, copies: int = size["layers"]) -> None:
        nonlocal place
        for i in range(copies):
            count = int(np.prod(shape))
            found[name.format(i)] = values[place : place + count].reshape(shape)
            place += count

    width, layer = size["width"], "model.layers.{}."
    take("model.embed_tokens.weight", size["vocab"], width, copies=1)
    take(layer + "input_layernorm.weight", width)
    for kind, count in (("q", size["heads"]), ("k", size["kv_heads"]), ("v", size["kv_heads"])):
        take(layer + f"self_attn.{kind}_proj.weight", count * head, width)
    take(layer + "self_attn.o_proj.weight", width, width)
    take(layer + "post_attention_layernorm.weight", width)
    take(layer + "mlp.gate_proj.weight", size["mlp"], width)
    take(layer + "mlp.down_proj.weight", width, size["mlp"])
    take(layer + "mlp.up_proj.weight", size["mlp"], width)
    take("model.norm.weight", width, copies=1)
    for name, kernel in found.items():
        if "q_proj" in name or "k_proj" in name:  # llama2.c turns neighbours, Hugging Face halves
            pairs = kernel.reshape(-1, head // 2, 2, width)
            found[name] = np.ascontiguousarray(pairs.swapaxes(1, 2).reshape(kernel.shape))
    return size, found


def read_pieces(file: Path, count: int) -> list[tuple[str, float]]:
    """The tokens of the vocabulary, each with its score."""
    data, place, found = file.read_bytes(), 4, []
    for _ in range(count):
        score, length = struct.unpack_from("<fi", data, place)
        text = data[place + 8 : place + 8 + length].decode()
        found.append((text.replace(" ", SPACE), score))
        place += 8 + length
    return found


def tokenizer_of(pieces: list[tuple[str, float]]) -> dict:
    """tokenizer.json: merges of two tokens into one, the best score first."""
    special = ["<unk>", "<s>", "</s>"]
    vocab = {text: i for i, text in enumerate([*special, *(text for text, _ in pieces[3:])])}
    scores = dict(zip(vocab, (score for _, score in pieces)))
    merges = []
    for text in sorted(vocab, key=lambda text: -scores[text]):
        cuts = [(text[:i], text[i:]) for i in range(1, len(text))]
        cuts = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        merges += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    begin = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text, space = {"Sequence": {"id": "A", "type_id": 0}}, {"String": SPACE}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True}
                         for i, name in enumerate(special)],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": SPACE},
            {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]},
        "post_processor": {"type": "TemplateProcessing", "single": [begin, text],
                           "pair": [begin, text, begin, {"Sequence": {"id": "B", "type_id": 0}}],
                           "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": space, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": vocab, "merges": merges},
    }  # fmt: skip


def main(source: Path, folder: Path) -> None:
    """Writes the Hugging Face folder from the folder with llama2.c's files."""
    size, tensors = read_weights(source / "stories260K.bin")
    tokenizer = tokenizer_of(read_pieces(source / "tok512.bin", size["vocab"]))
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": size["width"], "intermediate_size": size["mlp"],
        "num_hidden_layers": size["layers"], "num_attention_heads": size["heads"],
        "num_key_value_heads": size["kv_heads"], "vocab_size": size["vocab"],
        "max_position_embeddings": size["positions"], "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
        "hidden_act": "silu", "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    words = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    texts = {
        "config": config,
        "generation_config": {"bos_token_id": 1, "eos_token_id": [1, 2]},  # <s> ends stories too
        "tokenizer": tokenizer,
        "tokenizer_config": {"tokenizer_class": "PreTrainedTokenizerFast", **words,
                             "clean_up_tokenization_spaces": False,
                             "model_max_length": size["positions"]},
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name, values in texts.items():
        (folder / f"{name}.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
