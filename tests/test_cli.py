"""The command line: what each command says and writes, and one line and the right status for everything bad."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bertfast import native, seams
from bertfast.cli import COMMANDS, main

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")

import stock_models  # noqa: E402
from task_checkpoints import save_tokenizer  # noqa: E402

WORDS = [
    *"abcdefghijklmnopqrstuvwxyz.,!?",
    "the",
    "cat",
    "dog",
    "sat",
    "mat",
    "on",
    "and",
    "is",
    "of",
    "list",
    "call",
    "used",
]
COLUMNS = ("input_ids", "token_type_ids")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """checkpoint("BertForMaskedLM", **settings): the directory of a small model with large weights."""
    made = {}

    def make(name="BertForMaskedLM", **settings):
        key = (name, *settings.items())
        if key not in made:
            directory = tmp_path_factory.mktemp(name)
            torch.manual_seed(0)
            sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
            sizes |= {"vocab_size": save_tokenizer(directory, WORDS, COLUMNS), "max_position_embeddings": 40}
            if name in stock_models.CLASSES:
                config = stock_models.config_of(name, **sizes, **settings)
            else:
                config = transformers.BertConfig(**sizes, **settings)
            model = getattr(transformers, name)(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            model.save_pretrained(directory)
            made[key] = str(directory)
        return made[key]

    return make


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text(
        "the cat sat on the mat.\n\nA dog!\nit is used to call a list of values, and returns the name\n" * 4
    )
    return str(path)


def run(capsys, *arguments, status=0):
    """main(arguments), its status asserted: what it wrote to stdout."""
    capsys.readouterr()  # what making the checkpoint has written
    result = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert result == status, err
    return out if status in (0, 1) and not err else (out, err)


def refuse(capsys, *arguments, status=2):
    """The one line that stderr holds after a mistake; stdout holds nothing."""
    out, err = run(capsys, *arguments, status=status)
    assert out == "" and err.startswith("bertfast: error: ") and err.count("\n") == 1, (out, err)
    return err


# ---- doctor


def test_doctor_in_words_and_json(capsys):
    out = run(capsys, "doctor")
    assert torch.__version__ in out and "varlen_attention" in out and out.endswith("all essential things are well\n")
    report = json.loads(run(capsys, "doctor", "--json"))
    assert report["versions"]["torch"] == torch.__version__ and report["broken"] == []
    assert report["native"]["cpu"]["loaded"] is (native.cpu is not None)
    wanted = "reference" if native.cpu is None else "cpu"
    assert {op["backend"] for op in report["ops"]} == {wanted} and len(report["ops"]) == 10


def test_doctor_without_native_module(capsys, monkeypatch):
    find = COMMANDS["doctor"].importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: None if "_cpu" in name else find(name, *a))
    monkeypatch.setattr(native, "cpu", None)
    monkeypatch.setattr(native, "cpu_reason", "bertfast._cpu was not built: no compiler")
    COMMANDS["doctor"].backend.select("auto")  # forgets the choices made so far
    out = run(capsys, "doctor")
    assert "no compiler" in out and "install a C++17 compiler" in out and "refused cpu:" in out
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *a: SimpleNamespace())
    monkeypatch.setattr(native, "cpu_reason", "bertfast._cpu does not load: undefined symbol: foo")
    out = run(capsys, "doctor", status=1)
    assert "broken: bertfast._cpu does not load: undefined symbol: foo: reinstall" in out and "are well" not in out
    monkeypatch.undo()
    COMMANDS["doctor"].backend.select("auto")


def test_doctor_tries_the_ops(capsys, monkeypatch):
    right = COMMANDS["doctor"].ops.bias_gelu
    calls = []

    def wrong_at_first(*arguments):
        calls.append(arguments)
        return right(*arguments) * (1.1 if len(calls) == 1 else 1)

    monkeypatch.setattr(COMMANDS["doctor"].ops, "bias_gelu", wrong_at_first)
    assert "broken: bias_gelu in float32 on cpu fails: ArithmeticError: off by" in run(capsys, "doctor", status=1)


def test_doctor_and_a_backend_that_is_none(capsys, monkeypatch):
    monkeypatch.setenv("BERTFAST_BACKEND", "tpu")
    COMMANDS["doctor"].backend.select("auto")
    report = json.loads(run(capsys, "doctor", "--json", status=1))
    assert report["backend"]["setting"] == "tpu" and "unknown backend 'tpu'" in report["broken"][0]


# ---- check


@pytest.mark.parametrize(
    "name",
    [
        "BertModel",
        "BertForMaskedLM",
        "BertForSequenceClassification",
        "BertForQuestionAnswering",
        "BertForMultipleChoice",
        "RobertaForMaskedLM",
        "XLMRobertaModel",
        "ElectraForTokenClassification",
        "DistilBertModel",
        "MPNetForSequenceClassification",
    ],
)
def test_check_passes(capsys, checkpoint, lines, name):
    report = json.loads(run(capsys, "check", checkpoint(name), "--texts", lines, "--json"))
    assert report["verdict"] == "PASS" and report["calls"]["stock"] == 0 and report["min_cosine"] > 1 - 1e-6
    assert {"embeddings", "layer 1", "layer 2", "last_hidden_state"} <= report["errors"].keys()
    heads = {"BertForQuestionAnswering": "end_logits", "DistilBertModel": "last_hidden_state"}
    head = heads.get(name, "pooler_output" if name.endswith("Model") else "logits")
    assert 0 <= report["errors"][head]["patched_max"] <= report["errors"][head]["limit"]
    # A question-answering head reads padding, so with exact numbers its calls are not packed.
    assert report["calls"]["rectangle" if name == "BertForQuestionAnswering" else "packed"] >= 2


def test_check_in_words_on_texts_made_here(capsys, checkpoint):
    out = run(capsys, "check", checkpoint(), "--dtype", "bfloat16")
    assert "bfloat16, 48 texts" in out and "layer 2" in out and out.endswith("\nPASS\n")


def test_check_fails_where_the_numbers_are_wrong(capsys, checkpoint, lines, monkeypatch):
    right = seams.encoder_layer
    monkeypatch.setattr(seams, "encoder_layer", lambda *a, **k: right(*a, **k) * 1.001)
    out = run(capsys, "check", checkpoint(), "--texts", lines, status=1)
    assert "FAIL\n" in out and "layer 2 is further off than" in out
    monkeypatch.setattr(seams, "encoder_layer", lambda *a, **k: right(*a, **k) * torch.nan)
    report = json.loads(run(capsys, "check", checkpoint(), "--texts", lines, "--json", status=1))
    assert report["verdict"] == "FAIL" and not report["errors"]["last_hidden_state"]["pass"]


def test_check_fails_where_nothing_ran_fused(capsys, checkpoint, lines):
    out = run(capsys, "check", checkpoint(hidden_act="relu"), "--texts", lines, status=1)
    assert "the fused path never ran" in out and "0 packed, 0 fused" in out and "ReLU" in out


def test_check_on_a_real_checkpoint(capsys, minilm_path, tmp_path):
    (tmp_path / "lines.txt").write_text("A man is eating a piece of bread.\nThe girl is carrying a baby.\nHello!\n")
    assert run(capsys, "check", minilm_path, "--texts", tmp_path / "lines.txt").endswith("PASS\n")


# ---- bench


def test_bench_in_json(capsys, checkpoint, lines):
    threads = torch.get_num_threads()
    arguments = ("--texts", lines, "--batch-size", "5", "--rounds", "3", "--threads", "1", "--json")
    records = [json.loads(line) for line in run(capsys, "bench", checkpoint(), *arguments).splitlines()]
    environment, workload, stock, patched, ratio = records
    assert [r["record"] for r in records] == ["environment", "workload", "stock", "patched", "ratio"]
    assert environment["threads"] == 1 and torch.get_num_threads() == threads
    assert workload["texts"] == 12 and workload["batches"] == 3 and 0 < workload["padding"] < 1
    assert stock["rounds"] == patched["rounds"] == 9 and stock["p50_ms"] <= stock["p90_ms"] <= stock["p99_ms"]
    assert ratio["low"] <= ratio["speedup"] <= ratio["high"]
    assert ratio["calls"] == {"packed": 9 + 2 + 1, "rectangle": 0, "stock": 0}  # warm-up, and one for memory
    assert patched["packed_weights_bytes"] > 0 and 0 < patched["peak_memory_bytes"] < stock["peak_memory_bytes"]
    assert stock["sequences_per_s"] * workload["tokens"] == pytest.approx(stock["tokens_per_s"] * workload["texts"])


def test_bench_in_words_without_packed_weights(capsys, checkpoint):
    out = run(capsys, "bench", checkpoint(), "--no-pack-weights", "--seconds", "0.01", "--max-length", "16")
    assert re.search(r"packed weights, MB +- +0\.0\n", out)
    assert "256 texts" in out and "to 16," in out and "speedup" in out and "no interval" in out


def test_bench_stops_when_the_medians_are_known(capsys, checkpoint, lines):
    arguments = ("--texts", lines, "--batch-size", "5", "--threads", "1", "--json", "--seconds", "60")
    out = run(capsys, "bench", checkpoint(), *arguments, "--precision", "1000")
    _, _, stock, patched, ratio = map(json.loads, out.splitlines())
    assert stock["rounds"] == patched["rounds"] == 6, "two passes over three batches: the first that hold an interval"
    assert stock["converged"] and patched["converged"] and set(ratio["noise"]) == {"others", "steal", "noisy"}


def test_bench_times_nothing_that_is_wrong(capsys, checkpoint, monkeypatch):
    right = seams.encoder_layer
    monkeypatch.setattr(seams, "encoder_layer", lambda *a, **k: right(*a, **k) * 1.001)
    assert "nothing is timed" in refuse(capsys, "bench", checkpoint(), status=1)


# ---- fill-mask


def test_fill_mask_agrees_with_transformers(capsys, checkpoint):
    directory, sentence = checkpoint(), "The [MASK] sat on a [MASK]."
    report = json.loads(run(capsys, "fill-mask", directory, sentence, "--top", "3", "--json"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.BertForMaskedLM.from_pretrained(directory).eval()
    inputs = tokenizer(sentence, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, (inputs["input_ids"][0] == tokenizer.mask_token_id)]
    values, indices = logits.softmax(-1).topk(3)
    for mask, row, p in zip(report["masks"], indices, values, strict=True):
        assert [word["token"] for word in mask] == tokenizer.convert_ids_to_tokens(row.tolist())
        assert [word["probability"] for word in mask] == pytest.approx(p.tolist(), rel=1e-4)
    out = run(capsys, "fill-mask", directory, sentence)
    assert out.startswith(report["filled"] + "\n") and "mask 2" in out and "[MASK]" not in report["filled"]


def test_fill_mask_joins_pieces_of_words():
    tokenizer = SimpleNamespace(mask_token="[MASK]")
    assert (
        COMMANDS["fill-mask"].fill("Two dog [MASK] and a [MASK].", tokenizer, ["##s", "cat"]) == "Two dogs and a cat."
    )


@pytest.mark.parametrize(
    ("sentence", "options", "words"),
    [
        ("The cat sat.", (), "the sentence holds no mask: write [MASK] in place of a word"),
        ("cat " * 60 + "[MASK]", (), "longer than 40 tokens, and 1 masks lie behind that"),
        ("The [MASK].", ("--top", "0"), "--top must lie between 1 and"),
    ],
)
def test_fill_mask_refuses(capsys, checkpoint, sentence, options, words):
    assert words in refuse(capsys, "fill-mask", checkpoint(), sentence, *options)


def test_fill_mask_needs_a_masked_lm(capsys, checkpoint):
    assert "saved without a masked-LM head" in refuse(capsys, "fill-mask", checkpoint("BertModel"), "The [MASK].")


# ---- embed


def gold(directory, texts, max_length, pooling="mean"):
    """The vectors by transformers, one text at a time, in float64."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModel.from_pretrained(directory).double().eval()
    rows = []
    for text in texts:
        inputs = tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length, padding=False)
        with torch.no_grad():
            states = model(**inputs).last_hidden_state[0]
        rows.append(states.mean(0) if pooling == "mean" else states[0])
    return torch.stack(rows)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_embed_gives_a_row_a_line_in_order(capsys, checkpoint, lines, tmp_path, pooling):
    target, directory = tmp_path / "vectors.npy", checkpoint("BertModel")
    options = ("--input", lines, "--output", target, "--batch-size", "3", "--pooling", pooling)
    assert "16 vectors of 64" in run(capsys, "embed", directory, *options)
    vectors = np.load(target)
    texts = Path(lines).read_text().splitlines()
    assert vectors.dtype == np.float32 and vectors.shape == (16, 64)
    assert vectors == pytest.approx(gold(directory, texts, 40, pooling).numpy(), abs=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lines.txt", "vectors.npy"]


def test_embed_from_standard_input_without_transformers(capsys, checkpoint, tmp_path, monkeypatch):
    directory, target = checkpoint("BertModel"), tmp_path / "vectors.npy"
    texts = ["the cat", "", "a dog ran " * 30]
    expected = gold(directory, texts, 40)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(texts).encode())))
    monkeypatch.setitem(sys.modules, "transformers", None)
    run(capsys, "embed", directory, "--output", target, "--normalize")
    assert np.load(target) == pytest.approx(torch.nn.functional.normalize(expected, dim=1).numpy(), abs=1e-5)
    report = json.loads(run(capsys, "fill-mask", checkpoint(), "a [MASK]", "--json"))
    assert len(report["masks"]) == 1
    assert "pip install 'bertfast[transformers]'" in refuse(capsys, "check", directory)


def test_embed_as_sentence_transformers_does(capsys, minilm_path, tmp_path):
    texts = ["A man is eating a piece of bread.", "", "The girl is carrying a baby. " * 50]
    lines = tmp_path / "lines.txt"
    lines.write_text("\n".join(texts))
    target = tmp_path / "vectors.npy"
    assert "mean pooling, normalised" in run(capsys, "embed", minilm_path, "--input", lines, "--output", target)
    expected = torch.nn.functional.normalize(gold(minilm_path, texts, 256), dim=1).numpy()
    assert np.load(target) == pytest.approx(expected, abs=2e-6)
    run(capsys, "embed", minilm_path, "--input", lines, "--output", target, "--no-normalize", "--dtype", "bfloat16")
    norms = np.linalg.norm(np.load(target), axis=1)
    assert norms.min() > 1.5, "not normalised"


def modules(*kinds):
    return [
        {"idx": i, "name": str(i), "path": "" if i == 0 else f"{i}_{k}", "type": f"st.{k}"} for i, k in enumerate(kinds)
    ]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"modules.json": modules("Transformer", "Pooling", "Dense")}, "has a Dense module"),
        ({"1_Pooling/config.json": {"pooling_mode_max_tokens": True}}, "pools by max,"),
        ({"1_Pooling/config.json": {"pooling_mode": ["mean", "cls"]}}, "pools by mean and cls,"),
        ({"config_sentence_transformers.json": {"default_prompt_name": "query"}}, "puts the prompt 'query'"),
        ({"modules.json": modules("CLIPModel")}, "names no Transformer"),
        ({"modules.json": [3]}, "is not a list of modules"),
        ({"modules.json": [{**modules("Transformer")[0], "path": "0_Transformer"}]}, "keeps its encoder in 0_Trans"),
    ],
)
def test_embed_refuses_what_it_would_get_wrong(capsys, checkpoint, lines, tmp_path, files, words):
    directory = tmp_path / "model"
    directory.mkdir()
    for path in Path(checkpoint("BertModel")).iterdir():
        (directory / path.name).symlink_to(path)
    for name, content in {"modules.json": modules("Transformer", "Pooling"), **files}.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    target = tmp_path / "v.npy"
    assert words in refuse(capsys, "embed", directory, "--input", lines, "--output", target)
    assert not target.exists()


def test_embed_obeys_folder_and_length_limit(capsys, checkpoint, lines, tmp_path):
    inner = tmp_path / "model" / "0_Transformer"
    inner.parent.mkdir()
    inner.symlink_to(checkpoint("BertModel"))
    settings = {"modules.json": [{**modules("Transformer")[0], "path": "0_Transformer"}, *modules("", "Pooling")[1:]]}
    settings["1_Pooling/config.json"] = {"pooling_mode": "cls"}
    for name, content in settings.items():
        (inner.parent / name).parent.mkdir(exist_ok=True)
        (inner.parent / name).write_text(json.dumps(content))
    target = tmp_path / "v.npy"
    assert "cls pooling, float32" in run(capsys, "embed", inner.parent, "--input", lines, "--output", target)
    texts = Path(lines).read_text().splitlines()
    assert np.load(target) == pytest.approx(gold(inner, texts, 40, "cls").numpy(), abs=1e-5)


# ---- whatever is bad


def test_bad_models(capsys, checkpoint, lines, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    corrupt, lacking = tmp_path / "corrupt", tmp_path / "lacking"
    for directory in (corrupt, lacking):
        directory.mkdir()
        for path in Path(checkpoint()).iterdir():
            (directory / path.name).write_bytes(path.read_bytes())
    weights = corrupt / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    tensors = load_file(lacking / "model.safetensors")
    save_file({k: t for k, t in tensors.items() if "layer.1.output.dense" not in k}, lacking / "model.safetensors")
    for model in ("./nowhere", tmp_path / "nowhere", lines, empty, corrupt, lacking):
        target = tmp_path / "v.npy"
        for command in (("fill-mask", model, "a [MASK]"), ("embed", model, "--input", lines, "--output", target)):
            assert str(model) in refuse(capsys, *command)
        assert not target.exists()
        if model != lacking:  # transformers starts such weights anew
            assert str(model) in refuse(capsys, "check", model) and str(model) in refuse(capsys, "bench", model)


def test_a_hub_id_offline(capsys, lines, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for command in (("check",), ("embed", "--input", lines, "--output", tmp_path / "v.npy")):
        assert "nobody/nothing" in refuse(capsys, command[0], "nobody/nothing", *command[1:])


def test_models_that_patch_does_not_know(capsys, checkpoint, tmp_path):
    save_tokenizer(tmp_path, WORDS, COLUMNS)
    config = transformers.GPT2Config(vocab_size=100, n_embd=32, n_layer=1, n_head=2, n_positions=40)
    transformers.GPT2Model(config).save_pretrained(tmp_path)
    for command in ("check", "bench"):
        assert "no supported model" in refuse(capsys, command, tmp_path)
    assert "model_type is 'gpt2'" in refuse(capsys, "fill-mask", tmp_path, "a [MASK]")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((), "COMMAND"),
        (("chek",), "invalid choice: 'chek'"),
        (("check",), "MODEL"),
        (("check", "MODEL", "--dtype", "float8"), "invalid choice: 'float8'"),
        (("check", "MODEL", "--texts", "nowhere.txt"), "there is no text file nowhere.txt"),
        (("check", "MODEL", "--texts", "EMPTY"), "holds no text"),
        (("bench", "MODEL", "--texts", "LATIN"), "not UTF-8 text: byte 0xe9 in line 2"),
        (("bench", "MODEL", "--batch-size", "0"), "must be greater than 0, not 0"),
        (("bench", "MODEL", "--seconds", "nan"), "must be greater than 0, not nan"),
        (("bench", "MODEL", "--rounds", "many"), "invalid int value: 'many'"),
        (("bench", "MODEL", "--max-length", "41"), "--max-length must lie between 3 and the model's 40 positions"),
        (("embed", "MODEL", "--input", "EMPTY", "--output", "v.npy"), "holds no text"),
        (("embed", "MODEL", "--input", "nowhere.txt", "--output", "v.npy"), "there is no text file nowhere.txt"),
        (("embed", "MODEL", "--input", "LINES", "--output", "no/such/v.npy"), "no/such/v.npy cannot be written"),
        (("embed", "MODEL", "--input", "LINES", "--output", "."), "is a directory"),
        (("embed", "MODEL", "--input", "LINES", "--output", "v.npy", "--batch-size", "0"), "--batch-size"),
        (("embed", "MODEL", "--input", "LINES"), "--output"),
        (("embed", "MODEL", "--input", "LINES", "--output", "v.npy", "--pooling", "max"), "invalid choice: 'max'"),
    ],
)
def test_bad_arguments(capsys, checkpoint, lines, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "latin.txt").write_bytes(b"fine\ncaf\xe9\n")
    places = {"MODEL": checkpoint(), "LINES": lines, "EMPTY": "empty.txt", "LATIN": "latin.txt"}
    assert words in refuse(capsys, *(places.get(a, a) for a in arguments))
    assert not list(tmp_path.glob("*v.npy*"))


def test_errors_interrupts_and_tracebacks(capsys, monkeypatch):
    def raising(error):
        def run(args):
            raise error

        return run

    monkeypatch.setattr(COMMANDS["doctor"], "run", raising(KeyboardInterrupt()))
    assert refuse(capsys, "doctor", status=130) == "bertfast: error: interrupted\n"
    monkeypatch.setattr(COMMANDS["doctor"], "run", raising(RuntimeError("two\nlines")))
    assert "RuntimeError: two lines (--debug shows where)" in refuse(capsys, "doctor", status=1)
    assert main(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_help_of_every_command(capsys):
    for command in COMMANDS:
        assert COMMANDS[command].__doc__.split("\n")[0] in run(capsys, command, "--help")


def test_a_reader_that_leaves(tmp_path):
    command = [sys.executable, "-m", "bertfast", "doctor"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait(60) == 141
