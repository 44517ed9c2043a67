"""Test the page of a window in Chromium: interaction, and agreement with the cache."""

import http.client
import json
import re
import threading

import pytest
import torch
from typer.testing import CliRunner

from sparselogits.cli import app
from sparselogits.corpus import open_source, pack, packing_for
from sparselogits.corruption import Corruption
from sparselogits.data import CacheDataset
from sparselogits.errors import CacheError, IdentityMismatchError
from sparselogits.lab.report import PREFIX, PageServer, WindowViewer, view_page
from sparselogits.lab.report.tokens import TokenTexts
from sparselogits.lab.report.view import LIKELIEST, targets_entropy
from sparselogits.samplers import Systematic
from sparselogits.teacher import TransformersTeacher
from tests.conftest import build_cache, tiny_llama
from tests.lab.report.browser import DESKTOP, PHONE, opened
from tests.lab.report.conftest import LENGTH, TEXT
from tests.masked_models import VOCABULARY, bert_tokenizer, tiny_bert, write_short_texts


def test_the_view_is_what_the_models_and_the_cache_say(viewer):
    item = viewer.dataset[1]
    view = viewer.view(1)
    assert viewer.teacher is not None
    tokens = item["input_ids"][None]
    p = torch.cat([s.logits for s in viewer.teacher.logits(tokens)]).softmax(1)
    q = tiny_llama(seed=3)(tokens).logits[0].detach().softmax(1)
    dense = item["targets"].dense()
    assert len(view.positions) == LENGTH
    for at, position in enumerate(view.positions):
        assert position.label == (int(tokens[0, at + 1]) if at + 1 < LENGTH else None)
        ids = [row.id for row in position.rows]
        assert set(ids) >= set(p[at].topk(LIKELIEST).indices.tolist())
        assert position.label is None or position.label in ids
        torch.testing.assert_close(torch.tensor([r.teacher for r in position.rows]), p[at, ids])
        torch.testing.assert_close(torch.tensor([r.student for r in position.rows]), q[at, ids])
        cached = torch.tensor([row.weight or 0.0 for row in position.rows])
        torch.testing.assert_close(cached, dense[at, ids])
        metrics = position.metrics
        gap = float((dense[at] - p[at]).abs().sum() / 2)
        assert metrics["distance"] == pytest.approx(gap, abs=1e-5)
        # ids that are no token have probability 0 with the teacher, and add nothing
        real = p[at] > 0
        kl = float((p[at, real] * (p[at, real] / q[at, real]).log()).sum())
        assert metrics["kl"] == pytest.approx(kl, abs=1e-4)


def test_the_entries_entropy_lies_within_its_bounds(viewer):
    targets = viewer.dataset[0]["targets"]
    found = targets_entropy(targets)
    share = targets.dense() / targets.mass()[:, None]
    torch.testing.assert_close(found, torch.special.entr(share).sum(1))
    assert bool((found <= targets.entries_per_position.float().log() + 1e-5).all())


def test_running_text_is_the_windows_own(viewer, tokenizer):
    tokens = tokenizer(TEXT * 2)["input_ids"]
    texts = TokenTexts(tokenizer, tokens).running()
    assert len(texts) == len(tokens)
    assert "".join(texts) == TEXT * 2
    assert "" in texts  # a character of several tokens


def test_clicks_and_keys(viewer, browser, tmp_path):
    path = tmp_path / "window.html"
    path.write_text(view_page(viewer.view(0), rounds=12), encoding="utf-8")
    with opened(browser, path.as_uri(), size=DESKTOP) as page:
        panel = page.locator("#panel")
        chosen = page.locator("#text [aria-selected=true]")
        assert chosen.get_attribute("id") == "t1"
        page.click("#t5")
        assert chosen.get_attribute("id") == "t5"
        assert "predicted at position 4" in panel.inner_text()
        assert panel.locator("tr.label").count() == 1
        for key, expected in (("ArrowRight", "t6"), ("ArrowLeft", "t5"), ("Home", "t0")):
            page.keyboard.press(key)
            assert chosen.get_attribute("id") == expected
        assert "nothing in the window predicts it" in panel.inner_text()
        page.keyboard.press("End")
        assert chosen.get_attribute("id") == f"t{LENGTH}"
        assert "adds nothing to the loss" in panel.inner_text()
        levels = "getComputedStyle(document.getElementById('t9')).getPropertyValue('--level')"
        before = page.evaluate(levels)
        page.keyboard.press("c")
        assert page.evaluate(levels) != before
        assert page.locator("#measure").input_value() == "entropy of the teacher"
        # the hostile text is there to be read, and did nothing
        assert "onerror" in page.locator("#text").inner_text()
        assert page.locator("img").count() == 0
        assert page.title().startswith("Window 0")


def test_a_token_that_the_input_hides(browser, text, tmp_path):
    tokenizer = bert_tokenizer()
    packing = packing_for(tokenizer, window_length=LENGTH)
    source = open_source(write_short_texts(text, tmp_path / "text.jsonl"))
    corpus = pack(source, tokenizer, packing, tmp_path / "corpus", vocab_size=VOCABULARY)
    teacher = TransformersTeacher(
        tiny_bert(vocab_size=VOCABULARY, initializer_range=0.1), identity={"weights": "tiny"}
    )
    corruption = Corruption.of_tokenizer(tokenizer, VOCABULARY, rate=0.3)
    root = tmp_path / "cache"
    build_cache(teacher, corpus, root, Systematic(12), tokenizer, corruption=corruption)
    dataset = CacheDataset(tmp_path / "cache")
    labels = dataset[0]["shift_labels"]
    path = tmp_path / "window.html"
    view = WindowViewer(dataset, tokenizer=tokenizer, teacher=teacher).view(0)
    path.write_text(view_page(view, rounds=12), encoding="utf-8")
    chosen, other = int((labels != -100).nonzero()[-1]), int((labels == -100).nonzero()[-1])
    with opened(browser, path.as_uri(), size=DESKTOP) as page:
        panel = page.locator("#panel")
        page.click(f"#t{chosen}")
        assert "the original token is" in panel.inner_text()
        assert panel.locator("tr.label").count() == 1
        assert "sum of their weights" in panel.inner_text()
        page.click(f"#t{other}")
        assert "not chosen" in panel.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone(viewer, browser, tmp_path, scheme):
    path = tmp_path / "window.html"
    path.write_text(view_page(viewer.view(0), rounds=12), encoding="utf-8")
    with opened(browser, f"{path.as_uri()}#20", size=PHONE, scheme=scheme) as page:
        assert page.locator("#text [aria-selected=true]").get_attribute("id") == "t20"
        tops = [page.locator("#t20").bounding_box()]
        for key in ("ArrowUp", "ArrowDown"):
            page.keyboard.press(key)
            tops.append(page.locator("#text [aria-selected=true]").bounding_box())
        middle, above, back = (box["y"] for box in tops if box is not None)
        assert above < middle == back
        ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
        lightness = sum(map(int, re.findall(r"\d+", ground)[:3])) / 3
        assert (lightness < 64) == (scheme == "dark")
        assert page.evaluate("panel.scrollWidth <= panel.clientWidth")
        picture = page.screenshot(path=tmp_path / "phone.png")
        assert len(picture) > 10_000


def test_the_policy_forbids_what_is_not_in_the_file(viewer, browser, tmp_path):
    """The policy is not decoration: a script that is slipped in does not run."""
    path = tmp_path / "window.html"
    slipped = "<script>document.title = 'slipped in'</script></body>"
    path.write_text(view_page(viewer.view(0), rounds=12).replace("</body>", slipped), "utf-8")
    page = browser.new_page()
    page.goto(path.as_uri())
    assert page.title().startswith("Window 0")
    page.close()


def test_served_on_loopback(viewer, browser):
    def page_of(number: int) -> str:
        return view_page(viewer.view(number), rounds=12, link=f"{PREFIX}{{}}")

    with PageServer(page_of, first=0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = server.server_port
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{port}/")
        page.click("a[rel=next]")
        page.wait_for_url(f"**{PREFIX}1*")
        assert page.inner_text("h1") == "Window 1"
        page.close()
        for path, host, status in (
            (f"{PREFIX}0", f"127.0.0.1:{port}", 200),
            (f"{PREFIX}0", "elsewhere.example", 421),
            (f"{PREFIX}99999", f"127.0.0.1:{port}", 404),
            ("/etc/passwd", f"127.0.0.1:{port}", 404),
        ):
            asked = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
            asked.request("GET", path, headers={"Host": host})
            assert asked.getresponse().status == status
            asked.close()
        server.shutdown()


def test_what_cannot_be_shown_is_said(viewer):
    with pytest.raises(CacheError, match="does not contain window 999"):
        viewer.view(999)
    from transformers import PreTrainedTokenizerFast

    changed = json.loads(viewer.tokenizer.backend_tokenizer.to_str())
    changed["model"]["vocab"]["another"] = len(changed["model"]["vocab"])
    from tokenizers import Tokenizer

    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(changed)))
    with pytest.raises(IdentityMismatchError, match="ids mean other tokens"):
        WindowViewer(viewer.dataset, tokenizer=other)


def test_the_command_without_models(viewer, tmp_path):
    out = tmp_path / "page.html"
    words = ["view", str(viewer.dataset.cache.root), "--window", "1", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.strip() == str(out)
    assert "--tokenizer" in done.stderr
    data = re.search(r'id="data">(.*?)</script>', out.read_text(encoding="utf-8"), re.DOTALL)
    assert data is not None
    assert json.loads(data[1])["models"] == []
