"""Image classifiers: pictures read from what people bring, and the language models' machinery on them unchanged."""

import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from expunge import forget, registry
from expunge.bench import bench
from expunge.deltas import Delta
from expunge.errors import RowError, ScopeError, SubjectError
from expunge.methods.optimise.loop import Training
from expunge.methods.optimise.teach import teach
from expunge.methods.optimise.unlearn import unlearn
from expunge.pictures import Picture, chosen, read_pictures, write_folder
from expunge.rows import Source
from expunge.subjects.anatomy import structure
from expunge.subjects.fresh import fresh
from expunge.subjects.image import ImageClassifier, Preparation, weights_fingerprint
from expunge.subjects.packed import pack
from expunge.subjects.protocol import Subject, Taps
from expunge.tables.passes import Score, Store
from expunge.tables.passes import run as ask
from expunge.world.pictures.draw import PARTS, digits, glyphs, people
from expunge.world.pictures.models import Recipe, untrained

CLASSES = [str(i) for i in range(10)]
SMALL = {kind: Recipe(kind=kind, side=8, widths=(4, 8)) for kind in ("resnet", "vit")}
SHORT = Training(steps=2, batch_size=8, learning_rate=1e-3)


@pytest.fixture(scope="module")
def rows():
    return digits(8)["train"][:48]


@pytest.fixture(params=["resnet", "vit", "plain"])
def subject(request):
    if request.param != "plain":
        return untrained(CLASSES, SMALL[request.param], 0)
    return plain()


def make():
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))


def plain():
    torch.manual_seed(0)
    return ImageClassifier(make(), CLASSES, Preparation((8, 8)), "plain", make)


def sets(rows):
    forget, retain = chosen(rows, {"label": "3"})
    return {"forget": forget, "retain": retain}


def scores(subject, rows):
    return subject.score([((row.id, "answer"), subject.encode(row)) for row in rows])


def test_a_classifier_offers_what_a_subject_must(subject, rows):
    assert isinstance(subject, Subject)
    pack_ = pack([subject.encode(row) for row in rows[:3]])
    logits = subject.head(subject.hidden_states(pack_))
    pixels = torch.stack([subject.encode(row).pixels for row in rows[:3]])
    output = subject.model(pixels)
    plain_logits = output if isinstance(output, torch.Tensor) else output.logits
    assert torch.allclose(logits, plain_logits[[row for row, _ in pack_.owner]][pack_.predict], atol=1e-6)
    assert pack_.target.tolist() == [int(row.answer) for row in rows[:3]]


def test_scores_are_those_of_the_plain_model(subject, rows):
    table = scores(subject, rows)
    pixels = torch.stack([subject.encode(row).pixels for row in rows])
    output = subject.model(pixels)
    logprobs = (output if isinstance(output, torch.Tensor) else output.logits).detach().double().log_softmax(-1)
    target = torch.tensor([int(row.answer) for row in rows])
    assert np.allclose(table.logprob, logprobs[range(len(rows)), target], atol=1e-5)
    assert (table.hit == (logprobs.argmax(-1) == target).numpy()).all()
    assert np.allclose(-table.mean, -(logprobs.exp() * logprobs).sum(-1), atol=1e-5)
    assert table.keys[0] == (rows[0].id, "answer")


def test_a_picture_with_several_classes_runs_once(rows):
    subject = plain()
    pack_ = pack([subject.encode(rows[0], answer=c) for c in CLASSES])
    assert pack_.tokens == 1
    assert len(subject.hidden_states(pack_)) == 10


def test_kept_tables_know_the_picture_by_what_it_shows(rows, tmp_path):
    subject = plain()
    item = (("r", "answer"), rows[0], None, None)
    other = (("r", "answer"), rows[1], None, None)
    first, second = ask(subject, [Score((item,)), Score((other,))], Store(tmp_path))
    assert first.logprob != second.logprob
    assert len(list(tmp_path.iterdir())) == 2


def test_plain_objectives_change_classifiers_within_their_scope(subject, rows):
    before = weights_fingerprint(subject.model)
    data = sets(rows)
    outcome = unlearn(subject, registry.get("methods", "npo"), {}, scope="role:head", data=data, training=SHORT)
    names = {name for name, _ in subject.model.named_parameters()}
    assert set(outcome.delta.entries) == {name for name in names if name.startswith(subject._head_name)}
    assert weights_fingerprint(subject.model) == before
    after = outcome.delta.apply(subject)
    assert after.modality == "image"
    assert np.allclose(scores(after, rows).logprob, scores(outcome.subject, rows).logprob, atol=1e-5)


def test_blocks_and_roles_are_those_of_the_structure(rows):
    vit, net = (untrained(CLASSES, SMALL[kind], 0) for kind in ("vit", "resnet"))
    part = registry.get("methods", "fine_tune")
    for model in (vit, net):
        moved = unlearn(model, part, {}, scope="layers:-1", data=sets(rows), training=SHORT).delta.entries
        assert moved
        assert all(name.startswith(structure(model.model).blocks[-1].name + ".") for name in moved)
    with pytest.raises(ScopeError, match="no attention_qkv"):
        unlearn(net, part, {}, scope="role:attention_qkv", data=sets(rows), training=SHORT)
    moved = unlearn(vit, part, {}, scope="role:mlp_out@1", data=sets(rows), training=SHORT).delta.entries
    assert set(moved) == {"vit.layers.1.mlp.fc2.weight", "vit.layers.1.mlp.fc2.bias"}
    pack_ = pack([vit.encode(row) for row in rows[:2]])
    assert vit.states(pack_, Taps(layers=(1,)))["layer.1"].shape == (2, 8)
    with pytest.raises(SubjectError, match="blocks 0-3, there is no block 9"):
        vit.states(pack_, Taps(layers=(9,)))


@pytest.mark.parametrize(
    ("family", "inside", "outside", "attention"),
    [
        ("ViT", "mlp.fc1", "mlp.fc2", 4),
        ("Dinov2", "mlp.fc1", "mlp.fc2", 4),
        ("Data2VecVision", "intermediate.dense", "output.dense", 4),
        ("CLIP", "mlp.fc1", "mlp.fc2", 4),
    ],
)
def test_blocks_of_vision_transformers_have_a_decoders_roles(family, inside, outside, attention):
    size = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    size |= {"image_size": 8, "patch_size": 4}
    config = getattr(transformers, f"{family}Config")
    made = config(vision_config=size, bos_token_id=0, eos_token_id=1) if family == "CLIP" else config(**size)
    found = structure(getattr(transformers, f"{family}ForImageClassification")(made))
    assert len(found.blocks) == 2

    def owners(role):
        return {name.removeprefix(found.blocks[i].name + ".").rpartition(".")[0] for i, name in found.roles[role]}

    assert owners("mlp_in") == {inside}
    assert owners("mlp_out") == {outside}
    assert len(owners("attention_qkv") | owners("attention_out")) == attention
    assert all(found.roles[role] for role in ("norm", "head", "other"))
    assert not found.roles["router"]


def test_training_learns_statistics_and_the_delta_carries_them(rows):
    subject = untrained(CLASSES, SMALL["resnet"], 0)
    made = subject.copy()
    report = teach(made, [made.encode(row) for row in rows], epochs=40, batch_size=47, learning_rate=1e-2, seed=0)
    assert report["losses"][-1] < 0.5 * report["losses"][0]
    assert not made.model.training
    statistics = [name for name in Delta.from_models(subject, made).entries if "running" in name]
    assert statistics
    again = Delta.from_models(subject, made).apply(subject)
    assert np.allclose(scores(again, rows).logprob, scores(made, rows).logprob, atol=1e-5)


def test_fresh_weights_reach_every_module(subject):
    new, twin = fresh(subject, 1), fresh(subject, 1)
    assert weights_fingerprint(new.model) == weights_fingerprint(twin.model)
    old = dict(subject.model.named_parameters())
    same = [n for n, p in new.model.named_parameters() if torch.equal(p, old[n]) and p.dim() > 1 and "token" not in n]
    assert not [name for name in same if old[name].std() > 0 and "position" not in name]
    bare = ImageClassifier(make(), CLASSES, Preparation((8, 8)))
    with pytest.raises(SubjectError, match="no configuration and was given no factory"):
        fresh(bare, 0)


def test_saved_and_loaded_it_is_the_same(tmp_path, rows):
    subject = untrained(CLASSES, SMALL["resnet"], 0)
    subject.save(tmp_path / "model")
    loaded = ImageClassifier.load(tmp_path / "model", device="cpu")
    assert loaded.fingerprint == subject.fingerprint
    assert np.array_equal(scores(loaded, rows).logprob, scores(subject, rows).logprob)
    with pytest.raises(SubjectError, match="keep its delta"):
        plain().save(tmp_path / "plain")
    with pytest.raises(SubjectError, match=r"no config\.json"):
        ImageClassifier.load(tmp_path)


def test_a_head_that_is_not_linear_is_refused(rows):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10), nn.Softmax(-1))
    subject = ImageClassifier(model, CLASSES, Preparation((8, 8)), "odd")
    with pytest.raises(SubjectError, match="no linear layer gives its logits"):
        scores(subject, rows)


# --- reading ----------------------------------------------------------------------------------------------------------


def test_a_written_folder_reads_back(tmp_path):
    made = glyphs(1, 0, side=24)
    write_folder(made, tmp_path / "train")
    found = {row.id: row for row in read_pictures(Source(str(tmp_path)), "glyphs")}
    assert found.keys() == {row.id for row in made}
    for row in made:
        assert np.array_equal(found[row.id].pixels(), row.pixels())
        assert (found[row.id].answer, found[row.id].tags["style"]) == (row.answer, row.tags["style"])


def test_arrays_read_with_and_without_names(tmp_path):
    images, labels = np.zeros((3, 5, 4), np.uint8), np.array([0, 1, 1])
    np.savez(tmp_path / "a.npz", images=images, labels=labels, names=np.array(["cat", "dog"]))
    found = read_pictures(Source(str(tmp_path / "a.npz")), "a")
    assert [row.answer for row in found] == ["cat", "dog", "dog"]
    assert found[0].pixels().shape == (5, 4, 3)
    np.savez(tmp_path / "b.npz", images=images, labels=labels)
    assert read_pictures(Source(str(tmp_path / "b.npz")), "b")[1].answer == "1"
    np.savez(tmp_path / "c.npz", images=images.astype(float), labels=labels)
    with pytest.raises(RowError, match=r"images are float64 \(3, 5, 4\)"):
        read_pictures(Source(str(tmp_path / "c.npz")), "c")
    np.savez(tmp_path / "d.npz", images=images, labels=labels + 1, names=np.array(["cat", "dog"]))
    with pytest.raises(RowError, match="row 2: label 2 has no name; there are 2"):
        read_pictures(Source(str(tmp_path / "d.npz")), "d")


def test_saved_data_sets_read_with_the_names_of_their_classes(tmp_path):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.fromarray(np.full((4, 4, 3), shade, np.uint8)) for shade in (10, 20)]
    data = datasets.Dataset.from_dict({"img": images, "label": [1, 0]}, features=features)
    data.to_parquet(tmp_path / "data.parquet")
    found = read_pictures(Source(str(tmp_path / "data.parquet")), "p")
    assert [row.answer for row in found] == ["dog", "cat"]
    assert found[0].pixels()[0, 0, 0] == 10


def test_mistakes_in_folders_are_named(tmp_path):
    with pytest.raises(RowError, match="0 pictures, expected at least 1"):
        read_pictures(Source(str(tmp_path)), "x")
    write_folder([Picture("a", np.zeros((4, 4, 3), np.uint8), "cat")], tmp_path)
    (tmp_path / "cat" / "b.png").write_bytes(b"no picture")
    with pytest.raises(RowError, match=r"b\.png: not a readable picture"):
        read_pictures(Source(str(tmp_path)), "x")[1].pixels()
    (tmp_path / "cat" / "b.png").rename(tmp_path / "c.png")
    with pytest.raises(RowError, match="no class folder above it and no label"):
        read_pictures(Source(str(tmp_path)), "x")
    (tmp_path / "c.png").unlink()
    with open(tmp_path / "metadata.csv", "a", newline="") as file:
        csv.writer(file).writerow(["cat/lost.png", "l", "l"])
    with pytest.raises(RowError, match=r"names the file 'cat/lost\.png', which is not there"):
        read_pictures(Source(str(tmp_path)), "x")


def test_an_unknown_class_answers_with_the_nearest(rows):
    subject = ImageClassifier(make(), ["deer", *CLASSES[1:]], Preparation((8, 8)), "animals")
    with pytest.raises(RowError, match=r"animals has no class 'dear'\. Did you mean deer"):
        subject.encode(rows[0], answer="dear")
    with pytest.raises(RowError, match="no row has label = '11'"):
        chosen(rows, {"label": "11"})


def test_drawn_worlds_are_decided_by_their_seed():
    first, second = glyphs(3, 4), glyphs(3, 4)
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second))
    assert {row.answer for row in first} == set(PARTS)
    assert {row.tags["style"] for row in first} == {"filled", "outlined", "hatched"}
    faces = people(["ilva", "tovin"], 4, 0)
    mean = {name: np.mean([f.image for f in faces if f.answer == name], axis=0) for name in ("ilva", "tovin")}
    apart = np.abs(mean["ilva"] - mean["tovin"]).mean()
    again = np.mean([f.image for f in people(["ilva"], 4, 1)], axis=0)
    assert np.abs(again - mean["ilva"]).mean() < apart
    split = digits()
    assert (len(split["train"]), len(split["test"])) == (1300, 497)


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "images.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = ["deer", "fox"]
    rows = [Picture(r.id, r.image, names[i % 2]) for i, r in enumerate(glyphs(2, 0, side=8))]
    for split in ("train", "test"):
        write_folder(rows, tmp_path / "data" / "animals" / split)
    untrained(names, SMALL["resnet"], 0).save(tmp_path / "models" / "animals")
    exec(compile(example, "docs/images.md", "exec"), {})
    assert ImageClassifier.load(tmp_path / "models" / "scrubbed", device="cpu").classes == names
    assert (tmp_path / "runs" / "no-deer" / "delta.json").is_file()
    found = bench("image_forgetting", "models/no-deer", original="models/animals", data="data/no-deer", bootstrap=100)
    assert {"forget_accuracy", "retain_accuracy", "membership"} == set(found.headline)
    assert 0 < found.value("zrf") <= 1
    (tmp_path / "r.json").write_text('{"model": "models/animals", "data": {"forget": "data/x.jsonl"}}')
    (tmp_path / "data" / "x.jsonl").write_text('{"question": "who?", "answer": "me"}')
    with pytest.raises(RowError, match="no picture in the fields question, answer; map it"):
        forget(tmp_path / "r.json")


def test_adapters_go_on_the_layers_that_are_named(rows):
    vit = untrained(CLASSES, SMALL["vit"], 0)
    linear = [name for name, module in vit.model.named_modules() if isinstance(module, nn.Linear)]
    inside = next(name for name in linear if "attention" in name).rpartition(".")[2]
    scope = f"lora(r=2, modules={inside})"
    outcome = unlearn(vit, registry.get("methods", "npo"), {}, scope=scope, data=sets(rows), training=SHORT)
    assert outcome.delta.kind == "low_rank"
    assert np.allclose(scores(outcome.delta.apply(vit), rows).logprob, scores(outcome.subject, rows).logprob, atol=1e-5)
