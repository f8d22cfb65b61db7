"""SISA and S3T on small models: exactness bit for bit, folders that survive being killed, what they answer."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny

from expunge import cli, forget
from expunge.errors import EnsembleError, MismatchError, ParameterError, RequestError, RowError
from expunge.methods.exact.answers import answers
from expunge.methods.exact.ensemble import Ensemble, ExactCase
from expunge.methods.exact.stage import Stages
from expunge.pictures import Picture, write_folder
from expunge.registry import get
from expunge.rows import Row
from expunge.subjects.language import LanguageModel
from expunge.subjects.packed import pack
from expunge.world.pictures.draw import digits, glyphs
from expunge.world.pictures.models import Recipe, untrained

SMALL = {"shards": 2, "slices": 2, "rank": 2, "epochs": 1, "batch_size": 8, "learning_rate": 1e-2, "modules": "q_proj"}
PEOPLE = [("Ilva", "Tivin"), ("Tovin", "Carth"), ("Mara", "north"), ("Onn", "Carth"), ("Ulla", "Tivin"), ("Bo", "born")]


@pytest.fixture(scope="module")
def base():
    return untrained([str(i) for i in range(10)], Recipe(kind="vit", side=8, widths=(8,), patches=2), 0)


@pytest.fixture(scope="module")
def rows():
    return digits(8)["train"][:24]


@pytest.fixture(scope="module")
def kept(base, rows, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact") / "s3t"
    fit(base, rows, folder)
    return folder


@pytest.fixture
def ensemble(kept, tmp_path):
    shutil.copytree(kept, tmp_path / "copy")
    return Ensemble.load(tmp_path / "copy")


def fit(base, rows, folder, method="s3t", **settings):
    part = get("methods", method)
    return part.function(ExactCase(base, rows, folder), **part.resolve({**SMALL, **settings}))


def people():
    return [Row(id=f"p{i}", prompt=f"where was {n} born?", answer=a) for i, (n, a) in enumerate(PEOPLE)]


def language(architecture="llama"):
    return LanguageModel(*tiny(architecture), architecture)


def states(ensemble):
    return {(k, p): ensemble.state(k, p) for k, there in ensemble.stages.items() for p in there}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def all_same(first, second):
    return first.keys() == second.keys() and all(same(first[cell], second[cell]) for cell in first)


def of(ensemble, shard, slice_):
    return [row for row, (cell, _) in ensemble.rows.items() if cell == (shard, slice_)]


# --- exactness --------------------------------------------------------------------------------------------------------


def test_what_is_left_does_not_depend_on_what_the_deleted_slice_said(base, rows, ensemble, tmp_path):
    gone = set(of(ensemble, 0, 1))
    other = [replace(row, image=255 - row.pixels(), answer="0") if row.id in gone else row for row in rows]
    elsewhere = fit(base, other, tmp_path / "other")
    assert not same(ensemble.state(0, (0, 1)), elsewhere.state(0, (0, 1)))
    left, _ = ensemble.delete([next(iter(gone))])
    twin, _ = elsewhere.delete([next(iter(gone))])
    assert (left.served(0), left.served(1)) == ((0,), (0, 1))
    assert all_same(states(left), states(twin))


@pytest.mark.parametrize(("method", "settings"), [("s3t", {}), ("sisa", {}), ("sisa", {"weights": "all"})])
def test_retrained_it_is_the_ensemble_that_never_saw_the_rows(base, rows, tmp_path, method, settings, monkeypatch):
    gone = [rows[0].id, rows[7].id]
    left, _ = fit(base, rows, tmp_path / "seen", method, **settings).delete(gone)
    retrained, done = left.train(base, rows)
    # Laid out with the rows, which are deleted before anything is trained.
    monkeypatch.setattr(Ensemble, "train", lambda self, *_, **__: (self, None))
    laid = fit(base, rows, tmp_path / "never", method, **settings)
    monkeypatch.undo()
    laid, _ = laid.delete(gone)
    never, _ = laid.train(base, [row for row in rows if row.id not in gone])
    assert done.stages > 0
    assert retrained.share_usable == 1
    assert all_same(states(retrained), states(never))
    assert all(retrained.verify(base, rows).values())


def test_more_orders_do_not_change_the_chains_that_are_there_anyway(base, rows, ensemble, tmp_path):
    single = fit(base, rows, tmp_path / "single", budget=1)
    every = states(ensemble)
    assert len(states(single)) == 4 < len(every) == 8
    assert all(same(found, every[cell]) for cell, found in states(single).items())


def test_a_stage_moves_its_own_blocks_and_the_head_alone(base, ensemble):
    stages = ensemble.over(base)
    assert stages.groups == [[2, 3], [0, 1]]
    first, whole = ensemble.state(0, (0,)), ensemble.state(0, (0, 1))
    assert {name.split(".layers.")[1][0] for name in first if "lora" in name} == {"2", "3"}
    assert {name.split(".layers.")[1][0] for name in whole.keys() - first.keys()} == {"0", "1"}
    moved = {name for name in first if not torch.equal(first[name], whole[name])}
    assert moved == set(stages.head)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    delta = stages.delta(whole)
    assert all(".layers." in name or name in stages.head for name in delta.entries)
    delta.apply(stages.subject)
    assert all(torch.equal(before[name], p) for name, p in base.model.named_parameters())


def test_a_prefix_answers_with_the_head_it_was_trained_with(base, rows, ensemble):
    left, _ = ensemble.delete(of(ensemble, 0, 1)[:1])
    served = left.member(base, 0).linear_head.weight
    name = ensemble.over(base).head[0]
    assert torch.allclose(served, left.state(0, (0,))[name], atol=1e-6)


def test_verify_finds_another_bit(base, rows, ensemble):
    assert ensemble.verify(base, rows, shards=[0]) == {0: True}
    other = fit(base, rows, ensemble.folder.parent / "seeded", seed=1)
    place, foreign = (e.folder / "stages" / "0" / "0" for e in (ensemble, other))
    shutil.rmtree(place)
    shutil.copytree(foreign, place)
    assert ensemble.verify(base, rows, shards=[0]) == {0: False}


# --- deleting ---------------------------------------------------------------------------------------------------------


def test_the_longest_order_that_is_left_takes_over(ensemble):
    first = of(ensemble, 0, 0)[0]
    left, done = ensemble.delete([first])
    assert (left.served(0), done.served, done.hit) == ((1,), {0: (2, 1)}, ((0, 0),))
    assert done.rows_lost == left.sizes[0][0]
    assert sorted(p.name for p in (left.folder / "stages" / "0").iterdir()) == ["1"]
    assert done.stages == 3
    assert done.bytes > 0
    out, done = left.delete([of(left, 0, 1)[0]])
    assert (out.answering, out.share_usable, done.needs_training) == ([1], 0.5, False)
    none, done = out.delete([of(out, 1, 0)[0], of(out, 1, 1)[0]])
    assert (none.answering, done.needs_training) == ([], True)


def test_the_sequence_of_deletions_does_not_matter(kept, tmp_path):
    found = []
    for number, batches in enumerate(([["a", "b"]], [["a"], ["b"]], [["b"], ["a"]])):
        shutil.copytree(kept, tmp_path / str(number))
        left = Ensemble.load(tmp_path / str(number))
        names = {"a": of(left, 0, 0)[0], "b": of(left, 1, 1)[0]}
        for batch in batches:
            left, _ = left.delete([names[one] for one in batch])
        found.append(left)
    for other in found[1:]:
        assert other.rows == found[0].rows
        assert all_same(states(other), states(found[0]))


def test_deleting_twice_is_entered_and_does_nothing(ensemble):
    row = of(ensemble, 0, 0)[0]
    left, _ = ensemble.delete([row])
    again, done = left.delete([row])
    assert (done.row_ids, done.already, done.stages) == ((), (row,), 0)
    assert all_same(states(again), states(left))
    events = [json.loads(line) for line in (left.folder / "events.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["trained", "deleted", "deleted"]
    assert row not in (left.folder / "rows.jsonl").read_text()


def test_an_unknown_row_is_named_and_nothing_is_deleted(ensemble):
    row = of(ensemble, 0, 0)[0]
    with pytest.raises(RowError, match=rf"has no row '{row}x'; nothing was deleted\. Did you mean {row}"):
        ensemble.delete([row, f"{row}x"])
    assert all_same(states(Ensemble.load(ensemble.folder)), states(ensemble))


def test_rows_that_say_the_same_are_named(base, rows, tmp_path):
    doubled = [*rows[:23], replace(rows[0], id="twin")]
    _, done = fit(base, doubled, tmp_path / "twins", slices=1, budget=1).delete([rows[0].id])
    assert done.twins == ("twin",)


def test_a_slice_without_rows_is_left_out_of_its_orders(base, rows, ensemble):
    left, _ = ensemble.delete(of(ensemble, 0, 0))
    assert left.orders(0) == [(1,), (1,)]
    again, done = left.train(base, rows)
    assert (again.served(0), done.stages) == ((1,), 0)


# --- killed -----------------------------------------------------------------------------------------------------------


def test_a_killed_training_goes_on_to_the_same_bits(base, rows, ensemble, tmp_path, monkeypatch):
    teach, calls = Stages.teach, []

    def counted(self, *arguments, **named):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return teach(self, *arguments, **named)

    monkeypatch.setattr(Stages, "teach", counted)
    with pytest.raises(KeyboardInterrupt):
        fit(base, rows, tmp_path / "killed")
    assert sum(map(len, Ensemble.load(tmp_path / "killed").stages.values())) == 3
    resumed = fit(base, rows, tmp_path / "killed")
    assert len(calls) == 4 + 5
    assert all_same(states(resumed), states(ensemble))
    assert not (tmp_path / "killed" / "work").exists()


def test_a_stage_killed_between_two_steps_goes_on_to_the_same_bits(base, rows, ensemble, tmp_path, monkeypatch):
    part = get("methods", "s3t")
    settings = part.resolve(SMALL)

    def interrupt(_, done, total):
        if (done, total) == (1, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        part.function(ExactCase(base, rows, tmp_path / "killed", progress=interrupt), **settings)
    (state,) = (tmp_path / "killed" / "work").glob("*/state.json")
    assert json.loads(state.read_text())["step"] == 1
    resumed = part.function(ExactCase(base, rows, tmp_path / "killed"), **settings)
    assert all_same(states(resumed), states(ensemble))


def test_a_killed_deletion_is_completed_by_whoever_opens_the_folder(ensemble, monkeypatch):
    row = of(ensemble, 0, 0)[0]

    def killed(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ensemble, "_without", killed)
    with pytest.raises(KeyboardInterrupt):
        ensemble.delete([row])
    monkeypatch.undo()
    assert (ensemble.folder / "stages" / "0" / "0").is_dir()
    left = Ensemble.load(ensemble.folder)
    assert left.served(0) == (1,)
    assert row not in left.rows
    assert not (ensemble.folder / "stages" / "0" / "0").exists()


def test_stages_trained_after_a_deletion_are_not_taken_for_older_ones(base, rows, ensemble, monkeypatch):
    left, _ = ensemble.delete([of(ensemble, 0, 0)[0]])
    again, _ = left.train(base, rows)

    def killed(self, *_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Ensemble, "_without", killed)
    with pytest.raises(KeyboardInterrupt):
        again.delete([of(again, 1, 0)[0]])
    monkeypatch.undo()
    completed = Ensemble.load(again.folder)
    assert (completed.served(0), completed.served(1)) == ((0, 1), (1,))


# --- answering --------------------------------------------------------------------------------------------------------


def test_classifiers_answer_with_the_mean_of_their_logits(base, rows, ensemble):
    subject = ensemble.subject(base)
    packed = pack([subject.encode(row) for row in rows[:5]])
    with torch.no_grad():
        members = [ensemble.member(base, k) for k in range(2)]
        mean = torch.stack([m.head(m.hidden_states(packed)) for m in members]).mean(0)
        assert torch.allclose(subject.head(subject.hidden_states(packed)), mean, atol=1e-5)
    found = answers(subject, rows[:5])
    assert [one["predicted"] for one in found] == [subject.classes[i] for i in mean.argmax(1).tolist()]
    assert [one["right"] for one in found] == [one["predicted"] == one["answer"] for one in found]
    left, _ = ensemble.delete([of(ensemble, 0, 0)[0], of(ensemble, 0, 1)[0]])
    assert np.array_equal(
        [one["probability"] for one in answers(left.subject(base), rows[:5])],
        [one["probability"] for one in answers(ensemble.member(base, 1), rows[:5])],
    )


def test_language_models_learn_are_deleted_from_and_answer_together(tmp_path):
    base, rows = language(), people()
    settings = {"slices": 3, "budget": 1, "epochs": 6, "batch_size": 2, "modules": "attention", "learning_rate": 3e-2}
    ensemble = fit(base, rows, tmp_path / "lm", **settings)
    before = {"base": base, "ensemble": ensemble.subject(base)}
    items = {name: [((row.id, "a"), one.encode(row)) for row in rows] for name, one in before.items()}
    loss = {name: -one.score(items[name]).logprob.mean() for name, one in before.items()}
    assert loss["ensemble"] < loss["base"]
    members = [ensemble.member(base, k) for k in range(2)]
    packed = pack([base.encode(row) for row in rows])
    with torch.no_grad():
        mean = torch.stack([m.head(m.hidden_states(packed)) for m in members]).mean(0)
        both = before["ensemble"]
        assert torch.allclose(both.head(both.hidden_states(packed)), mean, atol=1e-5)
        prompt = ("p", "q"), base.prompt_text(rows[0])
        ids = base.prompt_ids(prompt[1], ("p", "q"))
        first = torch.stack([m.model(torch.tensor([ids])).logits[0, -1] for m in members]).mean(0).argmax()
    said = both.generate([prompt], max_new_tokens=1).texts[0][0]
    assert said == base.tokenizer.decode([first], skip_special_tokens=True).strip()
    left, _ = ensemble.delete(["p0"])
    hit = ensemble.rows["p0"][0][0]
    assert left.verify(base, rows, shards=[hit]) == ({hit: True} if left.served(hit) else {})
    assert {one["row_id"] for one in answers(left.subject(base), rows)} == {row.id for row in rows}


def test_merged_adapters_are_what_was_trained(tmp_path):
    base, rows = language("gpt2"), people()  # whose layers keep (in, out)
    ensemble = fit(base, rows, tmp_path / "lm", shards=1, slices=3, budget=1, modules="all", batch_size=2)
    stages = ensemble.over(base)
    state = ensemble.state(0, (0, 1, 2))
    working = stages._working(2)
    stages._begin(working, state, torch.Generator())
    packed = pack([base.encode(row) for row in rows])
    with torch.no_grad():
        assert torch.allclose(ensemble.member(base, 0).hidden_states(packed), working.hidden_states(packed), atol=1e-4)


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_anything_is_trained(base, rows, tmp_path):
    with pytest.raises(RowError, match=f"id '{rows[0].id}' was used in .* already"):
        fit(base, [*rows, rows[0]], tmp_path / "a")
    with pytest.raises(ParameterError, match="slices is 5, but the model has 4 blocks"):
        fit(base, rows, tmp_path / "a", slices=5)
    with pytest.raises(RowError, match="24 rows cannot fill 9 shards of 3 slices"):
        fit(base, rows, tmp_path / "a", shards=9, slices=3)
    with pytest.raises(RowError, match="has no class"):
        fit(base, rows, tmp_path / "a", classes=["0", "1"])
    with pytest.raises(ParameterError, match="expected at least 2"):
        fit(base, rows, tmp_path / "a", classes=["0"])
    with pytest.raises(ParameterError, match="budget is 7 for 2 slices"):
        fit(base, rows, tmp_path / "a", budget=7)
    with pytest.raises(ParameterError, match="parameter shards"):
        get("methods", "s3t").resolve({"shards": 0})
    assert not (tmp_path / "a").exists()


def test_other_rows_bases_and_designs_are_refused(base, rows, ensemble, tmp_path):
    other = untrained([str(i) for i in range(10)], Recipe(kind="vit", side=8, widths=(8,), patches=2), 1)
    with pytest.raises(MismatchError, match="was trained over a base with fingerprint"):
        ensemble.subject(other)
    row = of(ensemble, 0, 0)[0]
    changed = [replace(one, answer="0" if one.answer != "0" else "1") if one.id == row else one for one in rows]
    with pytest.raises(MismatchError, match="says something else than when"):
        ensemble.train(base, changed)
    with pytest.raises(MismatchError, match=f"knows the row '{row}', which the data does not have"):
        ensemble.train(base, [one for one in rows if one.id != row])
    with pytest.raises(MismatchError, match="was laid out without the row 'new'; new rows need a new ensemble"):
        ensemble.train(base, [*rows, replace(rows[0], id="new")])
    with pytest.raises(EnsembleError, match="holds an ensemble with another design"):
        fit(base, rows, ensemble.folder, epochs=2)
    with pytest.raises(ParameterError, match="has shards 0-1, there is no shard 2"):
        ensemble.member(base, 2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    with pytest.raises(EnsembleError, match="is not empty and holds no ensemble"):
        fit(base, rows, tmp_path / "full")


def test_damaged_folders_are_named(base, ensemble, tmp_path):
    with pytest.raises(EnsembleError, match=r"is no ensemble: it has no ensemble\.json"):
        Ensemble.load(tmp_path)
    file = ensemble.folder / "stages" / "0" / "0" / "tensors.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    with pytest.raises(EnsembleError, match="is damaged: its sha256"):
        ensemble.member(base, 0)
    (ensemble.folder / "stages" / "0" / ".0-1.77.partial").mkdir()  # of a process that was killed
    (ensemble.folder / "stages" / "0" / ".0-1.77.partial" / "stage.json").write_text("{}")
    left, _ = Ensemble.load(ensemble.folder).delete([of(ensemble, 1, 0)[0]])
    assert [p.name for p in (left.folder / "stages" / "0").iterdir() if p.name.startswith(".")] == []
    (ensemble.folder / "rows.jsonl").write_text("{")
    with pytest.raises(EnsembleError, match="is not a readable ensemble"):
        Ensemble.load(ensemble.folder)


def test_two_processes_do_not_change_one_folder(ensemble):
    import fcntl

    with open(ensemble.folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(EnsembleError, match="another process is changing"):
            ensemble.delete([of(ensemble, 0, 0)[0]])


def test_an_ensemble_with_nothing_left_says_so(base, ensemble):
    left, _ = ensemble.delete([of(ensemble, k, s)[0] for k in range(2) for s in range(2)])
    with pytest.raises(EnsembleError, match="no shard has a live order left; it needs training"):
        left.subject(base)
    with pytest.raises(EnsembleError, match="shard 1 has no live order left"):
        left.member(base, 1)


def test_the_example_of_the_docs_runs(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "exact.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    made = [Picture(r.id, r.image, ["deer", "fox"][i % 2]) for i, r in enumerate(glyphs(2, 0, side=8))]
    write_folder(made, tmp_path / "data" / "animals" / "train")
    untrained(["a", "b"], Recipe(kind="vit", side=8, widths=(8,), patches=2), 0).save("models/backbone")
    exec(compile(example, "docs/exact.md", "exec"), {})
    assert Ensemble.load("runs/animals").share_usable == 1


# --- the command line -------------------------------------------------------------------------------------------------


def test_commands_from_training_to_proof(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("EXPUNGE_LEDGER", str(tmp_path / "ledger.sqlite"))
    language().save(tmp_path / "base")
    lines = [json.dumps({"id": r.id, "question": r.prompt, "answer": r.answer}) for r in people()]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    out = str(tmp_path / "ens")

    def expunge(*arguments, code=0):
        assert cli.main(["exact", *arguments]) == code
        shown = capsys.readouterr()
        return json.loads(shown.out) if "--json" in arguments and not code else shown.out if not code else shown.err

    plain = ["--set", "slices=3", "--set", "shards=1", "--set", "rank=2", "--set", "epochs=1", "--set", "budget=2"]
    command = ["train", str(tmp_path / "base"), "--data", str(tmp_path / "rows.jsonl"), "--out", out, *plain]
    made = expunge(*command, "--device", "cpu", "--json")
    assert (made["share_usable"], made["rows"], made["shards"][0]["orders"]) == (1, 6, [[0, 1, 2], [1, 2, 0]])
    row = next(row for row, (cell, _) in Ensemble.load(out).rows.items() if cell == (0, 0))
    assert "E110" in expunge("delete", out, "nobody", code=2)
    assert "no row named" in expunge("delete", out, code=2)
    (tmp_path / "ids.txt").write_text(f"{row}\n\n")
    done = expunge("delete", out, "--file", str(tmp_path / "ids.txt"), "--json")
    assert (done["row_ids"], done["served"], done["needs_training"]) == ([row], {"0": [3, 2]}, False)
    assert "answers from slices" in expunge("show", out)
    assert expunge("show", out, "--json")["shards"][0]["served"] == [1, 2]
    assert expunge("verify", out, "--device", "cpu", "--json")["same"]
    answered = expunge(
        "predict", out, "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "said.jsonl"), "--json"
    )
    assert answered["rows"] == 6 == len((tmp_path / "said.jsonl").read_text().splitlines())
    expunge("export", out, "--shard", "0", "--out", str(tmp_path / "model"))
    assert LanguageModel.load(tmp_path / "model", device="cpu").name
    again = expunge("retrain", out, "--device", "cpu", "--json")
    assert (again["share_usable"], again["stages"]) == (1, 4)
    assert expunge(*command, "--device", "cpu", "--json")["share_usable"] == 1
    assert cli.main(["ledger", "list", "--json"]) == 0
    entries = json.loads(capsys.readouterr().out)
    assert [entry["event"] for entry in entries] == ["request_received", "finished"]
    assert row not in json.dumps(entries)
    assert "lays no ensemble out" in expunge(*command, "--method", "retrain", code=2)
    assert expunge("plan", "--trials", "200", "--json")[1]["budget"] == 6
    assert "until all are out" in expunge("plan", "--trials", "200", "--budget", "2")


def test_a_request_is_told_where_ensembles_are_trained(tmp_path):
    language().save(tmp_path / "base")
    (tmp_path / "f.jsonl").write_text('{"question": "who?", "answer": "me"}')
    (tmp_path / "r.json").write_text('{"model": "base", "data": {"forget": "f.jsonl"}, "method": "s3t"}')
    with pytest.raises(RequestError, match="s3t owns training, so a request cannot carry it out"):
        forget(tmp_path / "r.json", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
