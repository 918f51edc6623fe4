"""Write a tiny Llama with random weights, its tokenizer and a LoRA adapter: real files of a real model, no download.

    python tiny_model.py FOLDER      writes FOLDER and FOLDER-lora, about 1 MB; equal bytes for equal library versions

Runs with the Python of the engines (torch, transformers, tokenizers, safetensors). Weights are float32, so greedy
decoding is a pure function of the prompt: the same on every engine, batched or not.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 512
HIDDEN = 64  # two heads of 32, the smallest head the CPU attention kernels have
LAYERS = 2
HEADS = 2
CONTEXT = 2048
LORA_RANK = 8
SPECIAL = ("<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>")
TEXT = (
    "a router reads what each worker has cached and sends the request where most of it lies",
    "blocks are stored when they fill up and removed when the space is needed",
    "the first token ends the prefill and every further token is one step of decoding",
)
TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}<|assistant|>"


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE over `TEXT`, padded so that every id below the vocabulary size decodes to something."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(TEXT * 4, trainer)
    bpe.add_tokens([f"<{i}>" for i in range(bpe.get_vocab_size(), VOCABULARY)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=SPECIAL[0],
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)


def write_model(folder: Path) -> None:
    """The weights. Special tokens get a logit of exactly 0, which greedy decoding never picks among 507 random ones."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,  # wide enough that no two logits are close: no ties for float noise to break
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        model.lm_head.weight[: len(SPECIAL)] = 0.0
    model.save_pretrained(folder, safe_serialization=True)


def write_adapter(folder: Path) -> None:
    """A LoRA on the query and value projections, strong enough to change greedy answers."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        for projection in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{projection}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(LORA_RANK, HIDDEN, generator=generator) * 0.2
            tensors[f"{name}.lora_B.weight"] = torch.randn(HIDDEN, LORA_RANK, generator=generator) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": folder.name.removesuffix("-lora"),
        "target_modules": ["q_proj", "v_proj"],
        "r": LORA_RANK,
        "lora_alpha": 2 * LORA_RANK,
        "lora_dropout": 0.0,
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Write both folders."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder)
    write_model(folder)
    write_adapter(folder.with_name(folder.name + "-lora"))


if __name__ == "__main__":
    main()
