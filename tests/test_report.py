"""The report of a lens folder: computed sentences, escaped texts, one file that needs nothing else."""

import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise

import matplotlib
import numpy as np
import pandas as pd
import pytest
from prefdyn.book import report, report_figures, report_folder, report_words
from prefdyn.book.report_folder import ReportError

STEPS = (0, 100, 200, 300)
G = {0: (0.52, 0.10), 100: (0.21, 0.12), 200: (-0.05, 0.02), 300: (0.31, 0.05)}  # of the whole loss: g, se
POSITIVE = {0: 1.52, 100: 0.90, 200: 0.40, 300: 0.20}
COSINE = {0: 0.12, 100: 0.05, 200: -0.011, 300: 0.04}
EVIL = {
    "prompt": "<script>alert('p')</script> \"quoted\" **bold** <img src=x onerror=alert(1)>\nsecond line\x00\x1b[31m",
    "tokens": [
        "<script>",
        "alert('x')",
        "</script>",
        ' "',
        "&amp;",
        " **b**",
        " שלום",
        "\u202eevil",
        "\n",
        "\x07",
        " $x_1$",
    ],
}
VOID = {"meta", "link", "br", "img", "hr", "input"}


def about(**changes) -> dict:
    """An about.json of a pairs run."""
    made = {
        "kind": "after",
        "title": "DPO on your pairs",
        "made": "2026-11-30T12:00:00",
        "command": "prefdyn lens out/checkpoints --data pairs.jsonl --method dpo",
        "method": {"name": "dpo", "title": "Direct preference optimisation", "settings": {"beta": 0.1},
                   "loss": "sigmoid"},
        "targets": {"what": "final", "count": 128,
                    "sentence": "Greedy responses of the last checkpoint to 128 prompts."},
        "models": [{"step": s, "name": f"checkpoint-{s}", "sha256": f"{s:064x}"} for s in STEPS],
        "reference": "checkpoint-0",
        "model": {"class": "LlamaForCausalLM", "parameters": 134_515_008, "moving": 921_600, "dtype": "float32",
                  "adapter": "LoRA, rank 8"},
        "data": {"name": "pairs.jsonl", "records": 1100, "used": 1024, "left_out": {"the two replies are equal": 76},
                 "cut": {"prompts": 3, "chosen": 17, "rejected": 21}, "max_prompt": 256, "max_response": 128},
        "accuracy": {"method": "forward", "sentence": "Scores agree with a backward pass to 2e-06 of the largest."},
        "cost": {"seconds": 412.5, "share": None, "rows": 2048, "memory": "1.9 GB"},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": "CPU, 2 threads",
        "notes": ["G for the optimiser's steps is not known: its state is kept as a pickle, which is not read."],
    }  # fmt: skip
    return made | changes


def tables(steps=STEPS, paired=True, examples=8, layers=4, seed=0) -> dict[str, pd.DataFrame]:
    """Tables of a lens folder: the numbers of G are those above, the others are random."""
    rng = np.random.default_rng(seed)
    alignment, sequences, tokens, groups, likelihood = [], [], [], [], []
    words = ["The", " fox", " sleeps", " under", " the", " old", " tree", ",", " not", " far", " from", " home", "."]
    for i, step in enumerate(steps):
        g, se = G.get(step, (0.5 * math.exp(-step / 200), 0.05))
        positive = POSITIVE.get(step, 1.0)
        parts = {"full": g, "positive": positive, "negative": g - positive}
        parts |= (
            {"top": 0.6 * g, "middle": 0.3 * g, "bottom": 0.1 * g}
            if step
            else dict.fromkeys(("top", "middle", "bottom"), math.nan)
        )
        for name, value in parts.items():
            full = name == "full"
            alignment.append(
                {"step": step, "component": name, "g": value, "se": se if value == value else math.nan,
                 "g_opt": math.nan, "se_opt": math.nan, "n": examples, "weight": 1.0,
                 "cosine": COSINE.get(step, 0.1) if full else math.nan,
                 "cosine_opt": math.nan, "logp_targets": -50.0 + 2 * i,
                 "moved": 1.5 if step != steps[-1] else math.nan}
            )  # fmt: skip
        shares = rng.dirichlet(np.ones(examples))
        for e in range(examples):
            one = {"step": step, "example": e, "full": g * shares[e], "positive": positive * shares[e],
                   "negative": (g - positive) * shares[e]}  # fmt: skip
            one |= {"omega": 0.5 - 0.04 * i, "margin": 0.1 * i, "a_chosen": 0.1, "a_rejected": 0.2} if paired else {}
            sequences.append(one)
            for side in (0, 1) if paired else (0,):
                for position, word in enumerate(words):
                    sign = 1 - 2 * side
                    tokens.append(
                        {"step": step, "example": e, "side": side, "position": position, "token": word,
                         "logp": -1.0 - 0.01 * i * (e + 1), "w": 0.1 * sign, "a": float(rng.normal()),
                         "a_opt": math.nan,
                         "strength": 0.5, "third": -1}
                    )  # fmt: skip
        names = ["embedding", *(f"layer {j} {p}" for j in range(layers) for p in ("attention", "mlp", "norms"))]
        for name in [*names, "final norm", "head"]:
            groups.append({"step": step, "part": "full", "group": name, "g": float(rng.normal()) / 10, "cosine": 0.1})
        levels = {"chosen": -20.0 - 3.25 * i, "rejected": -22.0 - 6.0 * i, "target": -50.0 + 2 * i}
        for kind, logp in levels.items():
            if paired or kind != "rejected":
                n = 128 if kind == "target" else examples
                likelihood.append(
                    {"step": step, "kind": kind, "logp": logp, "se": 0.5, "per_token": logp / 13, "n": n}
                )  # fmt: skip
    texts = [
        {"example": e, "side": side, "prompt": "Write about the home of the fox.", "response": "".join(words)}
        for e in range(examples)
        for side in ((0, 1) if paired else (0,))
    ]
    rows = {"alignment": alignment, "sequences": sequences, "tokens": tokens, "groups": groups,
            "likelihood": likelihood, "texts": texts}  # fmt: skip
    return {name: pd.DataFrame(made) for name, made in rows.items()}


def every_step(last=300, renewed=100) -> pd.DataFrame:
    """The cheap tier of a live measurement: g above 0 at every second step."""
    steps = np.arange(1, last + 1)
    return pd.DataFrame(
        {"step": steps, "g": np.where(steps % 2 == 0, 0.5, -0.25), "d_step": steps // renewed * renewed,
         "norm": 1.0, "cosine": 0.02, "loss": 0.6}
    )  # fmt: skip


def keep(folder, said: dict, of: dict[str, pd.DataFrame], lines=False):
    """Write a lens folder and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "about.json").write_text(json.dumps(said), encoding="utf-8")
    for name, table in of.items():
        if lines:
            text = "".join(json.dumps(row) + "\n" for row in table.to_dict("records"))
            (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        else:
            table.to_parquet(folder / f"{name}.parquet")
    return folder


def pairs_folder(folder):
    return keep(folder, about(), tables())


def single_folder(folder):
    said = about(title="A reward of your own, at one checkpoint", models=about()["models"][:1])
    return keep(folder, said, tables(steps=(0,)))


def live_folder(folder):
    said = about(kind="live", title="DPO while it trains", models=[], reference=None, command=None)
    said["cost"] = {"seconds": 30.0, "share": 0.11, "rows": 64, "memory": None}
    return keep(folder, said, tables() | {"steps": every_step()}, lines=True)


def demonstrations_folder(folder):
    said = about(title="Supervised fine-tuning", method={"name": "sft", "title": "SFT", "settings": {}, "loss": None})
    return keep(folder, said, tables(paired=False))


def evil_folder(folder):
    said = about(
        title="<script>alert('t')</script> & co", notes=["<b>bold</b>", "a\u202eb"], command="lens '<x>' && rm"
    )
    said["data"]["left_out"] = {"<i>empty</i> reply": 3}
    of = tables(steps=(0, 300), examples=3)
    swap = dict(enumerate(EVIL["tokens"]))
    of["tokens"]["token"] = [
        swap.get(p, t) for p, t in zip(of["tokens"]["position"], of["tokens"]["token"], strict=True)
    ]
    of["texts"]["prompt"] = EVIL["prompt"]
    of["groups"]["group"] = of["groups"]["group"].replace("head", "$head$ <b>&")
    of["likelihood"]["kind"] = of["likelihood"]["kind"].replace("rejected", "<u>other</u>")
    return keep(folder, said, of)


FOLDERS = {
    "pairs": pairs_folder,
    "single": single_folder,
    "live": live_folder,
    "demonstrations": demonstrations_folder,
    "evil": evil_folder,
}


class Page(HTMLParser):
    """What a page is made of: elements with their attributes, its text, and whether all that opens is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The reports of all folders, as text."""
    root = tmp_path_factory.mktemp("lens")
    return {name: report.write(make(root / name)).read_text(encoding="utf-8") for name, make in FOLDERS.items()}


@pytest.fixture(scope="module")
def read(pages):
    """What is to be read in them."""
    return {name: Page(text).text for name, text in pages.items()}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_page_is_whole_and_needs_nothing_else(pages, name):
    text = pages[name]
    assert len(text.encode()) < 1_500_000
    page = Page(text)
    assert not page.open
    for tag, attributes in page.elements:
        assert tag not in ("script", "iframe", "object", "base", "form")
        for key in ("src", "href", "xlink:href", "srcset"):
            assert not re.match(r"(?i)\s*(https?:|//|javascript:)", attributes.get(key) or "")
        assert not [key for key in attributes if key.startswith("on")]
        if tag in ("img", "svg"):
            assert (attributes.get("alt") or attributes.get("aria-label") or "").strip()
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    names = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(names) == len(set(names))
    links = [a["href"][1:] for _, a in page.elements if a.get("href", "").startswith("#")]
    links += re.findall(r"url\(#([^)]+)\)", text)
    assert links and set(links) <= set(names)
    regions = [a["aria-label"] for _, a in page.elements if a.get("role") == "region"]
    assert len(regions) == len(set(regions))


@pytest.mark.parametrize("name", FOLDERS)
def test_headings_are_in_order(pages, name):
    levels = [int(tag[1]) for tag, _ in Page(pages[name]).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels))


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_not_known_is_a_dash(read, name):
    assert not re.search(r"(?i)(?<![a-z])(nan|inf|none|null|<na>|nat)(?![a-z])", read[name])


def test_the_lede_says_what_was_measured(read):
    assert (
        "Direct preference optimisation (loss: sigmoid) was measured at 4 checkpoints (steps 0 to 300), on 1,024 of "
        "1,100 records of pairs.jsonl." in read["pairs"]
    )
    assert "128 target responses (final)" in read["pairs"]
    assert "134,515,008 parameters, of which 921,600 are trained (0.685%)" in read["pairs"]


def test_the_sign_of_g_is_counted_by_its_rule(read):
    # 0.52 - 0.196 > 0; 0.21 - 0.235 < 0 < 0.21 + 0.235; -0.05 + 0.039 < 0; 0.31 - 0.098 > 0
    assert (
        "G of the whole loss is surely positive (g − 1.96 se > 0) at 2 of 4 checkpoints, surely negative "
        "(g + 1.96 se < 0) at 1, neither at 1. It goes from +0.520 (se 0.100) at step 0 to +0.310 (se 0.0500) at "
        "step 300." in read["pairs"]
    )
    assert "lies between −0.0110 and +0.120 (known at 4 of 4 checkpoints)" in read["pairs"]


def test_an_unknown_error_is_never_sure():
    table = pd.DataFrame({"g": [1.0, -1.0, 0.1], "se": [math.nan, 0.1, 0.1]})
    assert report_words.signs(table) == {"positive": 0, "negative": 1, "neither": 1, "unknown": 1}


def test_which_half_leads_and_where_it_turns(tmp_path, read):
    # |positive| - |negative|: 1.52 - 1.00, 0.90 - 0.69, 0.40 - 0.45, 0.20 - 0.11
    found = report_words.lead(report_folder.read(pairs_folder(tmp_path / "p")))
    assert found.difference == pytest.approx([0.52, 0.21, -0.05, 0.09])
    assert found.turns() == [(100, 200, "positive", "negative"), (200, 300, "negative", "positive")]
    assert "The positive half leads (|G positive| > |G negative|) at 3 of 4 checkpoints" in read["pairs"]
    assert (
        "Over training the lead turns 2 times: from positive to negative between steps 100 and 200 and from negative "
        "to positive between steps 200 and 300." in read["pairs"]
    )


def test_the_error_of_the_lead_is_that_of_the_sequences(tmp_path):
    folder = report_folder.read(pairs_folder(tmp_path / "p"))
    one = folder.tables["sequences"].query("step == 0")
    each = one["positive"] + one["negative"]  # |G negative| = -G negative, of the other sign
    assert report_words.lead(folder).se[0] == pytest.approx(np.sqrt(8 * each.var(ddof=1)))
    fewer = {**folder.tables, "sequences": folder.tables["sequences"].query("example < 7")}
    assert np.isnan(report_words.lead(report_folder.Folder(folder.about, fewer)).se).all()


def test_changes_of_log_probs_have_the_error_of_the_same_responses(tmp_path, read):
    chosen, rejected, targets = report_words.changes(report_folder.read(pairs_folder(tmp_path / "p")))
    # Example e of 8 changes by -13 * 0.01 * 3 * (e + 1) from the first to the last step.
    each = -0.39 * np.arange(1, 9)
    assert chosen.since[-1] == pytest.approx(-9.75) and rejected.since[-1] == pytest.approx(-18.0)
    assert chosen.se[-1] == pytest.approx(each.std(ddof=1) / np.sqrt(8))
    assert np.isnan(chosen.se[0]) and np.isnan(targets.se).all()
    assert "by −9.75 (se 0.338) for chosen responses (from −20.0 at step 0 to −29.8 at step 300)" in read["pairs"]
    assert "by +6.00 for targets (from −50.0 at step 0 to −44.0 at step 300)" in read["pairs"]


def test_captions_are_computed(read):
    text = read["pairs"]
    assert "largest +0.520 at step 0, smallest −0.0500 at step 200" in text
    assert "The two have opposite signs at 3 of 4 checkpoints" in text
    assert "the largest |G| is that of top at 3, middle at 0, bottom at 0. Not known at step 0:" in text
    assert "the same sign in 3 of 3 intervals. In sum +4.50 and +6.00 nats a response" in text  # 3 x 1.5, 3 x 2
    groups = tables()["groups"].query("step == 300").set_index("group")["g"]
    top = groups.abs().idxmax()
    assert (
        f"At step 300 the largest |G| is that of {top}: {report_words.signed(groups[top])} of "
        f"{report_words.signed(groups.sum())} in all." in text
    )
    assert "G for the optimiser's steps: g_opt is not known at any step." in text
    assert text.count("The data: alignment.parquet, beside this file.") == 5


def test_one_checkpoint_says_nothing_about_change(read):
    text = read["single"]
    assert (
        "At step 0, the only checkpoint, G of the whole loss is +0.520 (se 0.100): surely positive (g − 1.96 se > 0)."
        in text
    )
    assert "The larger half is the positive one: |G positive| − |G negative| is +0.520, se" in text
    for word in ("over training", "turn", "changed", "It goes", "since step"):
        assert word.lower() not in text.lower()
    assert "Not known: top, middle and bottom" in text


def test_live_measurements_show_every_step_and_leave_parquet(tmp_path):
    folder = live_folder(tmp_path / "live")
    text = Page(report.write(folder).read_text(encoding="utf-8")).text
    assert "surely positive (g − 1.96 se > 0) at 2 of 4 measurements" in text
    assert "above 0 at 150 of 300 steps; largest +0.500 at step 2, smallest −0.250 at step 1." in text
    assert "Triangles: d was renewed 4 times (at steps 0, 100, 200 and 300)." in text
    assert "was measured 4 times (steps 0 to 300)" in text and "11.0%" in text
    again = pd.read_parquet(folder / "steps.parquet")
    pd.testing.assert_frame_equal(again, every_step(), check_dtype=False)
    assert not list(folder.glob(".*"))


def test_torn_and_repeated_lines_are_counted(tmp_path):
    folder = live_folder(tmp_path / "live")
    path = folder / "steps.jsonl"
    repeated = json.dumps({"step": 300, "g": 7.5, "d_step": 300, "norm": 1, "cosine": None, "loss": 0.5})
    path.write_text(path.read_text() + repeated + '\n{"step": 301, "g"')
    text = Page(report.write(folder).read_text(encoding="utf-8")).text
    assert "1 row(s) of steps.jsonl were written again later" in text and "largest +7.50 at step 300" in text
    assert "The last line of steps.jsonl is torn" in text
    path.write_text("{\n" + path.read_text())
    with pytest.raises(ReportError, match=r"steps\.jsonl, line 1 is not JSON"):
        report.write(folder)


def test_long_runs_stay_small(tmp_path):
    steps = tuple(range(0, 20_000, 20))
    of = tables(steps=steps, examples=2, layers=30)
    of["steps"] = every_step(last=30_000, renewed=20)
    of["tokens"] = of["tokens"][of["tokens"]["step"].isin([0, steps[-1]])]
    folder = keep(tmp_path / "long", about(kind="live"), of)
    text = report.write(folder).read_text(encoding="utf-8")
    assert len(text.encode()) < 1_500_000
    assert "Of 1,000 points 400, evenly spaced, are drawn." in text and "mean of 75 steps at a time" in text
    assert "The first and the last 200 of 6,000 rows; all are in alignment.parquet." in text


def test_long_responses_are_cut_and_counted(tmp_path):
    of = tables(steps=(0, 300), examples=1)
    first = of["tokens"].iloc[[0]]
    longer = [
        one.assign(step=step, position=np.arange(1000) + 100)
        for step in (0, 300)
        for one in [pd.concat([first] * 1000)]
    ]
    of["tokens"] = pd.concat([of["tokens"], *longer], ignore_index=True)
    page = Page(report.write(keep(tmp_path / "p", about(), of)).read_text(encoding="utf-8"))
    assert "the first 300 of 1,013 tokens" in page.text


def test_texts_of_data_cannot_become_part_of_the_page(pages, read):
    page, text = Page(pages["evil"]), read["evil"]
    assert not {"script", "b", "i", "u", "x"} & {tag for tag, _ in page.elements}
    assert not [tag for tag, attributes in page.elements if tag == "img" or "onerror" in attributes]
    for shown in ("<script>alert('p')</script>", '"quoted" **bold**', "<i>empty</i> reply", "<b>bold</b>",
                  "⟨U+0000⟩⟨U+001B⟩[31m",
                  "⟨U+202E⟩evil", "שלום", "⟨U+0007⟩", "&amp;", "$x_1$", "<u>other</u>", "$head$ <b>&"):  # fmt: skip
        assert shown in text, shown
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069]", pages["evil"])
    assert "↵\n" in pages["evil"], "a line end within a response is seen, and ends the line"


def test_tokens_are_shaded_by_what_they_contribute(tmp_path):
    of = tables(steps=(0, 300), examples=2)
    quiet = of["tokens"].assign(a=0.001)
    quiet.loc[(quiet["position"] == 1) & (quiet["side"] == 1), "a"] = 2.0  # w = -0.1 there
    page = Page(report.write(keep(tmp_path / "p", about(), of | {"tokens": quiet})).read_text(encoding="utf-8"))
    spans = [a for tag, a in page.elements if tag == "span" and "title" in a]
    assert {a["title"] for a in spans if a.get("class") == "n9"} == {"−0.200"}
    assert {a.get("class") for a in spans if a["title"] == "+1.00×10⁻⁴"} == {"p1"}
    assert "Largest: “fox” −0.200;" in page.text
    assert "Chosen +0.00130 in all" in page.text and "Rejected" in page.text  # 13 x 0.1 x 0.001


def test_demonstrations_have_no_rejected_side(read):
    text = read["demonstrations"]
    assert "Response" in text and "Chosen" not in text
    assert "for chosen responses" in text and "rejected responses (" not in text and "for rejected" not in text


def test_examples_are_spread_over_their_contributions(read):
    assert (
        "Of the 8 examples whose tokens were kept, 5 evenly spaced in the order of their contribution" in read["pairs"]
    )
    assert "All 3 examples whose tokens were kept at steps 0 and 300" in read["evil"]


@pytest.mark.parametrize("name", ["alignment", "sequences", "tokens", "groups", "likelihood", "texts"])
def test_a_missing_table_leaves_its_part_out_and_says_so(tmp_path, name):
    of = tables()
    del of[name]
    text = Page(report.write(keep(tmp_path / "p", about(), of)).read_text(encoding="utf-8")).text
    if name == "sequences":
        assert "of its standard errors at" not in text
    elif name == "likelihood":  # the targets' are in `alignment` too
        assert "changed by +6.00 for targets" in text and "the table likelihood is not in this folder" in text
    else:
        assert f"the table {name} is not in this folder" in text


def test_an_empty_folder_is_reported_on_too(tmp_path):
    text = Page(report.write(keep(tmp_path / "p", about(), {})).read_text(encoding="utf-8")).text
    assert "was measured at 0 checkpoints" in text and "Not known: the table alignment is not in this folder." in text


def test_null_and_empty_parts_of_about_are_dashes(tmp_path):
    bare = dict.fromkeys(about()) | {"kind": "after", "title": "Bare"}
    text = Page(report.write(keep(tmp_path / "p", bare, tables())).read_text(encoding="utf-8")).text
    assert "on – of – records of data without a name" in text


def test_what_a_folder_lacks_is_named(tmp_path):
    with pytest.raises(ReportError, match=r"about\.json is not in the folder 'nothing'"):
        report.write(tmp_path / "nothing")
    said = about()
    del said["method"], said["cost"]
    with pytest.raises(ReportError, match=r"method: Field required; cost: Field required"):
        report.write(keep(tmp_path / "a", said, {}))
    with pytest.raises(ReportError, match=r"about\.json is not JSON"):
        (tmp_path / "a" / "about.json").write_text("{", encoding="utf-8")
        report.write(tmp_path / "a")


def test_a_wrong_table_is_named_and_the_old_report_stays(tmp_path):
    folder = pairs_folder(tmp_path / "p")
    old = report.write(folder).read_text(encoding="utf-8")
    good = tables()["groups"]
    for wrong, message in [
        (good.drop(columns=["g", "cosine"]), r"groups\.parquet has no column g, cosine; there are: step, part, group"),
        (good.assign(g="much"), r"groups\.parquet, column g: must hold numbers"),
        (good.assign(step=0.5), r"groups\.parquet, column step: must hold whole numbers, given 0\.5$"),
        (pd.concat([good, good.iloc[:2]]), r"groups\.parquet: 2 row\(s\) have the same step, part, group"),
    ]:
        wrong.to_parquet(folder / "groups.parquet")
        with pytest.raises(ReportError, match=message):
            report.write(folder)
    (folder / "groups.parquet").write_bytes(b"no parquet")
    with pytest.raises(ReportError, match=r"groups\.parquet cannot be read"):
        report.write(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == old


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.00512, "−0.00512"), (1234567.0, "1.23×10⁶"), (1.5e-7, "1.50×10⁻⁷"), (-12345.6, "−12,346"),
     (math.nan, "–"), (-math.inf, "–"), (None, "–"), (-1200, "−1,200"), (np.int64(7), "7"), (np.float32(0.5), "0.500"),
     (999.9, "1,000")],
)  # fmt: skip
def test_numbers(value, text):
    assert report_words.number(value) == text


def test_a_figure_keeps_its_numbers_and_gets_names_of_its_own():
    svg = (
        '<svg width="9pt" viewBox="0 0 9 9" xmlns="http://www.w3.org/2000/svg"><metadata>x</metadata>'
        '<path id="a" d="M 1.23456 2" style="stroke: #0072b2"/><use xlink:href="#a" clip-path="url(#b)"/>'
        "<text style=\"font: 9.5px 'DejaVu Sans', serif; text-anchor: end\">0.00123</text></svg>"
    )
    assert report_figures._for_page(svg, "g", 'a "name" & <more>') == (
        '<svg viewBox="0 0 9 9" role="img" aria-label="a &quot;name&quot; &amp; &lt;more&gt;">'
        '<path id="g-a" d="M 1.23 2" style="stroke: var(--blue)"/><use href="#g-a" clip-path="url(#g-b)"/>'
        '<text style="font-size: 9.5px; text-anchor: end">0.00123</text></svg>'
    )


def test_responses_that_are_sampled_anew_are_no_change_and_are_shown_at_the_last_step(tmp_path):
    folder = pairs_folder(tmp_path / "p")
    tokens = pd.read_parquet(folder / "tokens.parquet")
    first, last = tokens["step"].min(), tokens["step"].max()
    tokens["example"] += (tokens["step"] == first) * 100
    tokens.to_parquet(folder / "tokens.parquet")
    likelihood = pd.read_parquet(folder / "likelihood.parquet")
    likelihood["kind"] = likelihood["kind"].replace({"chosen": "sampled"})
    likelihood[(likelihood["kind"] != "target") | (likelihood["step"] > 0)].to_parquet(folder / "likelihood.parquet")
    page = report.write(folder).read_text(encoding="utf-8")
    assert f"At step {first} it was other examples, which are not shown." in page
    assert f"<h4>Step {last}</h4>" in page and f"<h4>Step {first}</h4>" not in page
    found = report_folder.read(folder)
    assert [change.kind for change in report_words.changes(found)] == ["rejected", "target"]
    assert "as its change since the first step at which it is known" in page


def test_a_point_that_stands_alone_has_its_interval_drawn_as_a_bar():
    nan = math.nan
    panel = report_figures._Panel("x", "y")
    panel.line([0, 1, 2, 3, 4], [nan, 5.0, nan, 2.0, 3.0], "blue", se=[nan, 1.0, nan, 0.5, 0.5])
    (bars,) = [c for c in panel.ax.collections if hasattr(c, "get_segments")]
    assert np.vstack(bars.get_segments()) == pytest.approx(np.array([[1.0, 5 - 1.96], [1.0, 5 + 1.96]]))


def test_writing_a_report_leaves_the_figures_of_others_alone(tmp_path):
    before = dict(matplotlib.rcParams)
    report.write(pairs_folder(tmp_path / "p"))
    assert dict(matplotlib.rcParams) == before


def test_the_same_folder_gives_the_same_page(tmp_path):
    folder = pairs_folder(tmp_path / "p")
    assert report.write(folder).read_bytes() == report.write(folder).read_bytes()
