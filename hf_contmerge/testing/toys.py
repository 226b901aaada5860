"""A tiny real Llama and its tokenizer, made in a second."""

import functools
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXT = """
The quick brown fox jumps over a lazy dog while red, green and blue birds sing songs about law, medicine and code.
A court may refuse the claim of a party who gave no notice to the other side within thirty days of the contract.
The nurse gives the patient two tablets in the morning, and measures the pulse and the temperature in the evening.
To sort a list, write a function that returns the smaller of two numbers and call it again until nothing changes.
Question: which of these animals lays eggs? Answer: the hen. Question: what is two and two? Answer: it is four.
"""
SPECIAL = ("<|pad|>", "<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
PAD, BOS, EOS = range(3)
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@functools.cache
def toy_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 384 entries with ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT.strip().splitlines(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[PAD],
        bos_token=SPECIAL[BOS],
        eos_token=SPECIAL[EOS],
        model_max_length=512,
    )
    wrapped.chat_template = CHATML
    return wrapped


def toy_llama(
    folder: Path,
    *,
    seed: int,
    tied: bool = True,
    dtype: torch.dtype = torch.float32,
    hidden: int = 32,
    layers: int = 2,
) -> Path:
    """Write a random Llama with tokenizer and generation config; return the folder."""
    tokenizer = toy_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to change
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.to(dtype=dtype)  # pyright: ignore
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)
