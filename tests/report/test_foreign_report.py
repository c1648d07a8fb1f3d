"""The page about another library's model: its number, terms, samples and single images."""

import re

import numpy as np
import pytest
from support.commands import nelbo_fails, run_ok
from support.conditional import ddpm, dit, images

import nelbo
from nelbo import evaluate
from nelbo.report import foreign
from nelbo.report.markup import rounded
from nelbo.runs import foreign_samples

diffusers = pytest.importorskip("diffusers")

pytestmark = [
    pytest.mark.filterwarnings("ignore:the schedule ends with signal left"),
    pytest.mark.filterwarnings("ignore:__array_:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    dit().save_pretrained(place / "transformer")
    ddpm().save_pretrained(place / "scheduler")
    np.savez(place / "x.npz", x=images(9).movedim(1, -1).numpy().astype(np.uint8))
    return place


def test_the_page_states_what_evaluate_measures(folder, tmp_path, capsys):
    """The same bound and notes; pictures of samples and of the cheapest and dearest image."""
    source, page = f"diffusers:{folder},label=3", tmp_path / "page.html"
    options = ["--data", str(folder / "x.npz"), "--calls", "18", "--steps", "5"]
    run_ok("report", source, "--out", str(page), *options)
    assert "open " in capsys.readouterr().err
    html = page.read_text()
    again = nelbo.report(
        source, tmp_path / "y.html", data=folder / "x.npz", calls=18, steps=5, device="cpu"
    )
    assert again.read_text() == html
    data = np.load(folder / "x.npz")["x"]
    want = evaluate(source, data, steps=5, calls=18, per_example=True)
    assert rounded(want.value, want.standard_error.total) in html
    assert want.model_hash in html and "16 samples in 5 steps" in html
    assert "ancestral sampling in 5 of 6 steps" in html and "9 images were measured" in html
    assert not re.search(r"(src|href)=.https?:", html)
    assert "Σ KL( q ‖ P )" in html and html.count("data:image/png;base64,") == 1 + 6
    bounds = -want.per_example.elbo * want.value / want.nats
    for value, name in ((bounds.min(), "least"), (bounds.max(), "largest")):
        assert re.search(rf"{name}</td><td[^>]*>{value.item():.4g}<", html)


def test_samples_have_the_conditions_of_some_examples(folder, tmp_path):
    """Sixteen samples for the labels of nine examples, at even distances."""
    labels, data = np.arange(9), folder / "x.npz"
    np.save(tmp_path / "labels.npy", labels)
    source, page = (
        f"diffusers:{folder},condition={tmp_path / 'labels.npy'}",
        tmp_path / "page.html",
    )
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            foreign, "drawer", lambda found: seen.append(found) or foreign_samples.drawer(found)
        )
        html = nelbo.report(source, page, data=data, calls=18, steps=5).read_text()
    (found,) = seen
    assert found.condition.rows(16).flatten().tolist() == [i * 9 // 16 for i in range(16)]
    assert "16 samples in 5 steps, of P(x|class) for some of the examples" in html
    pair, x = (dit(), ddpm()), np.load(data)["x"]
    in_memory = nelbo.report(pair, page, data=x, condition=labels, calls=18, steps=5)
    want = evaluate(source, x, steps=5, calls=18, per_example=True)
    assert rounded(want.value, want.standard_error.total) in in_memory.read_text()


def test_what_is_refused(folder, tmp_path, capsys):
    source = f"diffusers:{folder},label=3"
    assert "give some with --data" in nelbo_fails(capsys, "report", source)
    line = nelbo_fails(capsys, "report", tmp_path, "--steps", "5")
    assert "--steps is for another library's model; leave it out" in line
    with pytest.raises(ValueError, match=r"give some with data$"):
        nelbo.report(source, tmp_path / "x.html")
    with pytest.raises(ValueError, match=r"^calls is for another library's model; leave it out"):
        nelbo.report(tmp_path, calls=8)
