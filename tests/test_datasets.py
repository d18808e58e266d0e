"""The three benchmarks read from hand-written trees: images, splits, training pairs, texts, queries, vocabularies."""

from collections import Counter
from hashlib import sha256

import numpy as np
import pytest

from benchmarks.base import note_passed_over
from datasets import (
    DATASETS,
    Epoch,
    Fashion200k,
    FashionIQ,
    MITStates,
    clean_caption,
    parent_captions,
)
from flags import get_parser
from machine.errors import InputError
from training.data import make_data
from training.resuming import Start
from training.settings import filled

from .conftest import LABEL, flags, picture, write_fashion200k, write_mitstates


def epoch(dataset, seed=0, number=0):
    return list(Epoch(dataset, seed, number))


def test_samples_depend_on_seed_epoch_and_position_alone(benchmark_tree):
    name, path = benchmark_tree
    for suffix in ("", "/"):
        dataset = DATASETS[name](f"{path}{suffix}", "train")
        backwards = Epoch(dataset, 0, 0)
        assert [backwards[i] for i in reversed(range(len(backwards)))][::-1] == epoch(DATASETS[name](path, "train"))
    assert epoch(dataset, 0, 0) != epoch(dataset, 0, 1)
    assert epoch(dataset, 0, 0) != epoch(dataset, 1, 0)


def test_mitstates_splits_by_noun_and_skips_what_the_original_skips(mitstates):
    train, test = MITStates(mitstates, "train"), MITStates(mitstates, "test")
    assert train.images == [f"images/{folder}/{i}.jpg" for folder in
                            ("old bus", "old dog", "wet bus", "wet dog", "young dog") for i in range(2)]
    assert dict.fromkeys(test.captions) == dict.fromkeys(("old tomato", "ripe fig", "ripe tomato", "sliced fig",
                                                          "sliced tomato"))
    assert train.training_texts() == train.captions and len(train) == 10


def test_mitstates_pairs_share_a_source_and_differ_in_the_targets_adjective(mitstates):
    dataset = MITStates(mitstates, "train")
    own_state = 0
    for number in range(40):
        samples = epoch(dataset, 0, number)
        assert len({sample.source for sample in samples}) == 5                  # half of the ten images
        for first, second in zip(samples[::2], samples[1::2], strict=True):
            captions = [dataset.captions[i] for i in (first.source, first.target, second.target)]
            assert first.source == second.source and captions[1] != captions[2]
            assert len({caption.split()[1] for caption in captions}) == 1
            assert [first.text, second.text] == [caption.split()[0] for caption in captions[1:]]
            own_state += captions[0] in captions[1:]
    assert own_state > 0                                                        # a target may have the source's state


def test_mitstates_targets_are_drawn_evenly(mitstates):
    dataset = MITStates(mitstates, "train")
    drawn = Counter(dataset.captions[sample.target] for number in range(400) for sample in epoch(dataset, 0, number)
                    if dataset.captions[sample.target].endswith("dog"))
    assert max(drawn.values()) < 1.15 * min(drawn.values())


def test_mitstates_queries_are_every_image_with_every_other_adjective(mitstates):
    dataset = MITStates(mitstates, "test")
    (asked,) = dataset.task().query_sets
    found = {(dataset.images[source], text) for source, text in zip(asked.sources, asked.texts, strict=True)}
    assert found == {(f"images/{a} {n}/{i}.jpg", b) for n, states in
                     (("tomato", ("ripe", "sliced", "old")), ("fig", ("ripe", "sliced")))
                     for a in states for b in states if a != b for i in range(2)}
    assert len(asked.texts) == len(found) == 16
    assert (asked.excluded == asked.sources).all()
    whole = MITStates(mitstates, "test", complete_text=True).task().query_sets[0]
    assert set(whole.texts) == {"ripe tomato", "sliced tomato", "old tomato", "ripe fig", "sliced fig"}


def test_mitstates_judges_composition_adjective_and_noun(mitstates):
    dataset = MITStates(mitstates, "test")
    (asked,) = dataset.task().query_sets
    assert [metric.name for metric in asked.metrics] == ["correct_composition", "correct_adj", "correct_noun"]
    q = next(i for i, text in enumerate(asked.texts)
             if text == "ripe" and dataset.captions[asked.sources[i]] == "old tomato")
    for metric, goal in zip(asked.metrics, ("ripe tomato", "ripe", "tomato"), strict=True):
        correct = {dataset.captions[i] for i in np.flatnonzero(metric.gallery_labels == metric.query_labels[q])}
        assert correct == {caption for caption in dataset.captions if goal in caption}


@pytest.mark.parametrize(("caption", "cleaned"), [
    (" blue v.neck dress \n", "blue vdotmarkneck dress"), ("what? & why*", "whatquestionmark andmark whystarmark")])
def test_fashion200k_captions_are_cleaned(caption, cleaned):
    assert clean_caption(caption) == cleaned


@pytest.mark.parametrize(("caption", "parents"), [
    ("red dress", ["dress", "red"]), ("red red dress", ["dress", "red red"]),
    ("red tailored dress", ["tailo dress", "red dress", "red tailored"]),       # 'red' goes out of 'tailored' too
    ("a b c", ["b c", "a c", "a b"])])
def test_fashion200k_parents_drop_a_word_wherever_its_letters_stand(caption, parents):
    assert parent_captions(caption) == parents


def test_fashion200k_pairs_are_siblings(fashion200k):
    dataset = Fashion200k(fashion200k, "train")
    assert len(dataset) == 10 and dataset.training_texts()[:2] == ["red dress", "red dress"]
    found = {(dataset.captions[sample.source], dataset.captions[sample.target], sample.text)
             for number in range(60) for sample in epoch(dataset, 0, number)}
    assert found == {("red dress", "blue dress", "replace red with blue"),      # through the parent "dress"
                     ("blue dress", "red dress", "replace blue with red"),
                     ("red dress", "red shirt", "replace dress with shirt"),    # through the parent "red"
                     ("red shirt", "red dress", "replace shirt with dress")}
    sources = Counter(dataset.images[sample.source] for number in range(60) for sample in epoch(dataset, 0, number))
    assert len(sources) == 6                                                    # both images of each, no tuxedo


def test_fashion200k_text_falls_back_to_the_last_word(fashion200k):
    dataset = Fashion200k(fashion200k, "train")
    longer, shorter = "red long dress", "red dress"
    assert dataset.text(longer, shorter) == "replace long with dress"           # all of "red dress" is in the source
    assert dataset.text(shorter, longer) == "replace dress with long"
    assert Fashion200k(fashion200k, "train", complete_text=True).text(longer, shorter) == "red dress"


def test_fashion200k_queries_are_the_listed_ones(fashion200k):
    dataset = Fashion200k(fashion200k, "test")
    (asked,) = dataset.task().query_sets
    assert asked.texts == ["replace red with blue", "replace dress with skirt"]
    assert [dataset.images[i] for i in asked.sources] == ["women/test/0/0_0.jpeg", "women/test/1/1_1.jpeg"]
    (metric,) = asked.metrics
    assert [dataset.captions[np.flatnonzero(metric.gallery_labels == label)[0]] for label in metric.query_labels] \
        == ["blue dress", "blue skirt"]


def test_fashion_iq_texts_gallery_and_metrics(fashion_iq):
    train, test = FashionIQ(fashion_iq, "train"), FashionIQ(fashion_iq, "test")
    assert train.triplets[0].text == "dress is darker by 0 and it "             # blank captions are kept
    assert train.triplets[4].text == "shirt is darker by 1 and it has a longer a-line hem"
    assert {sample.text for sample in epoch(train)} == set(train.training_texts()) and len(train) == 9
    assert len(train.images) == 12 and "BOTHT1" not in train.ids                # in no triplet, so not needed
    task = test.task()
    assert len(task.gallery) == 13 and len(set(test.images)) == 13              # BOTHV1 counts once
    assert [metric.name for asked in task.query_sets for metric in asked.metrics] == [
        f"{kind}_{category}" for category in ("dress", "shirt", "toptee")
        for kind in ("correct", "own_gallery", "VAL_gallery")]
    shirt = task.query_sets[1]
    assert (shirt.excluded == -1).all()
    assert [test.images[i] for i in shirt.metrics[1].among] == [f"all_imgs/{name}.jpg" for name in
                                                               ("SV000", "SV001", "SV002", "SV003", "BOTHV1")]
    assert [test.images[i] for i in shirt.metrics[0].query_labels] == [f"all_imgs/SV00{i}.jpg" for i in (1, 2, 3)]


def test_fashion_iq_one_category(fashion_iq):
    dataset = FashionIQ(fashion_iq, "test", category="toptee")
    assert dataset.triplets[1].text == "is darker by 1 has a longer a-line hem"
    assert len(dataset.images) == 5 and len(dataset.task().query_sets) == 1


@pytest.mark.parametrize(("folder", "ending"), [("images", ".jpg"), ("img", ".png"), ("all_imgs", ".jpeg")])
def test_fashion_iq_other_folders_and_endings(fashion_iq, folder, ending):
    old = fashion_iq / "all_imgs"
    for file in old.iterdir():
        file.rename(file.with_suffix(ending))
    old.rename(fashion_iq / folder)
    dataset = FashionIQ(fashion_iq, "test")
    assert dataset.images[0] == f"{folder}/DV000{ending}"


def moved(fashion_iq, place):
    """The images of all_imgs, each moved to where `place` says of its id."""
    for file in sorted((fashion_iq / "all_imgs").rename(fashion_iq / "before").iterdir()):
        target = fashion_iq / place(file.stem)
        target.mkdir(parents=True, exist_ok=True)
        file.rename(target / file.name)


def test_fashion_iq_folders_of_categories(fashion_iq):
    before = FashionIQ(fashion_iq, "test").images
    moved(fashion_iq, lambda name: f"images/{name[0]}")
    assert FashionIQ(fashion_iq, "test").images == [
        image.replace("all_imgs", f"images/{image.split('/')[1][0]}") for image in before]
    (fashion_iq / "all_imgs").mkdir()                                           # empty: the others are looked at too
    assert FashionIQ(fashion_iq, "test").images[0] == "images/D/DV000.jpg"


def test_fashion_iq_takes_the_first_of_several_images_of_an_id(fashion_iq):
    """all_imgs before images before img; in each, what lies in it before its folders."""
    moved(fashion_iq, lambda name: {"D": "all_imgs/x", "S": "images", "T": "img/y", "B": "images/b"}[name[0]])
    for name in ("all_imgs/DV001.png", "images/DV000.jpg", "images/b/SV000.jpg", "img/SV001.jpg", "img/y/z/TV009.jpg"):
        picture(fashion_iq / name)
    images = dict(zip(FashionIQ(fashion_iq, "test").ids, FashionIQ(fashion_iq, "test").images, strict=True))
    assert images == {"DV000": "all_imgs/x/DV000.jpg", "DV001": "all_imgs/DV001.png", "DV002": "all_imgs/x/DV002.jpg",
                      "DV003": "all_imgs/x/DV003.jpg", **{f"SV00{i}": f"images/SV00{i}.jpg" for i in range(4)},
                      "BOTHV1": "images/b/BOTHV1.jpg", **{f"TV00{i}": f"img/y/TV00{i}.jpg" for i in range(4)}}
    (fashion_iq / "img/y/TV003.jpg").rename(fashion_iq / "img/y/z/TV003.jpg")   # one level of folders is enough
    assert FashionIQ(fashion_iq, "test").images[-1] == "all_imgs/TV003.jpg"


@pytest.mark.parametrize(("name", "label"), [("mitstates", "composition"), ("fashion200k", "composition")])
def test_the_train_split_is_judged_against_its_own_targets(name, label, tmp_path):
    from .conftest import WRITERS
    path = WRITERS[name](tmp_path)
    dataset, again = (DATASETS[name](path, "train") for _ in range(2))
    task = dataset.task(seed=3)
    (asked,) = task.query_sets
    assert len(task.gallery) == len(asked.sources) == len(dataset) and (asked.excluded == -1).all()
    assert asked.metrics[0].name == f"correct_{label}"
    assert (asked.metrics[0].query_labels == asked.metrics[0].gallery_labels).all()
    assert again.task(seed=4).gallery.tolist() != task.gallery.tolist() == again.task(seed=3).gallery.tolist()


def test_a_large_train_split_is_judged_on_9600_samples(tmp_path, monkeypatch):
    dataset = MITStates(write_mitstates(tmp_path), "train")
    dataset.images, dataset.captions = dataset.images * 1000, dataset.captions * 1000
    dataset.index()
    assert len(dataset.task().gallery) == 9600


def test_leaving_images_out_takes_what_refers_to_them(mitstates, fashion200k, fashion_iq):
    wet_bus = frozenset(f"images/wet bus/{i}.jpg" for i in range(2))
    train = MITStates(mitstates, "train", without=wet_bus)
    assert set(train.captions) == {"old dog", "wet dog", "young dog"}           # 'bus' has one adjective left
    assert train.dropped == {"images": 2, "nouns with one adjective": 1, "images of those nouns": 2}
    queries = Fashion200k(fashion200k, "test", without=frozenset(["women/test/0/0_0.jpeg"]))
    assert len(queries.images) == 5 and len(queries.task().query_sets[0].texts) == 1
    assert queries.dropped == {"images": 1, "queries": 1}
    triplets = FashionIQ(fashion_iq, "test", without=frozenset(["all_imgs/SV001.jpg"]))
    assert triplets.dropped == {"images": 1, "triplets": 2} and len(triplets.task().gallery) == 12


def test_only_jpgs_of_folders_with_a_space_are_read(mitstates):
    picture(mitstates / "images" / "old dog" / "note.png")
    (mitstates / "images" / "a file.jpg").write_text("")
    assert len(MITStates(mitstates, "train").images) == 10


def test_any_suffix_reads_other_pictures_too(mitstates):
    names = ("old dog/2.JPG", "old dog/3.png", "ripe fig/0.JPG", "old dog/note.txt")
    for name in names[:3]:
        picture(mitstates / "images" / name)
    (mitstates / "images" / names[3]).touch()
    (mitstates / "images" / "new dog").mkdir()
    picture(mitstates / "images" / "new dog" / "0.jpeg")
    with pytest.raises(InputError, match=r"new dog holds no \.jpg \(--any_suffix True reads others\)"):
        MITStates(mitstates, "train")
    train, test = (MITStates(mitstates, split, any_suffix=True) for split in ("train", "test"))
    assert train.images == [f"images/{name}.jpg" if "." not in name else f"images/{name}" for name in (
        "new dog/0.jpeg", "old bus/0", "old bus/1", "old dog/0", "old dog/1", "old dog/2.JPG", "old dog/3.png",
        "wet bus/0", "wet bus/1", "wet dog/0", "wet dog/1", "young dog/0", "young dog/1")]
    assert test.images[2:5] == ["images/ripe fig/0.JPG", "images/ripe fig/0.jpg", "images/ripe fig/1.jpg"]
    assert train.dropped == {"images": 0, "files that do not end as pictures do": 1}
    assert note_passed_over([train, test]) == ""


def test_a_run_says_once_what_any_suffix_would_read(mitstates, tmp_path, caplog):
    for name in ("old dog/2.JPG", "old dog/3.png", "ripe fig/2.JPG"):
        picture(mitstates / "images" / name)
    (mitstates / "images" / "old dog" / "note.txt").touch()

    def notes(**given):
        caplog.clear()
        args = get_parser().parse_args(flags("mitstates", mitstates, tmp_path, image_cache="none", **given))
        return make_data(filled(args), Start(None, None, None, 1)), caplog.messages
    data, said = notes()
    assert len(data.train.images) == 10 and said == [
        "note: 3 files end in .JPG or .png, which the published protocol does not read; --any_suffix True reads them"]
    data, said = notes(any_suffix=True)
    assert len(data.train.images) == 12 and said == []


def test_validation_takes_whole_nouns_out_of_what_is_trained_on(mitstates):
    """Which ones depends on their names: those whose sha256 is in the lowest share."""
    lots = {noun: int(sha256(noun.encode()).hexdigest()[:16], 16) / 16**16 for noun in ("dog", "bus")}
    between = sum(lots.values()) / 2
    held, kept = sorted(lots, key=lots.get)
    train, validation, test = (MITStates(mitstates, split, held_out=between)
                               for split in ("train", "validation", "test"))
    assert {caption.split()[1] for caption in validation.captions} == {held}
    assert {caption.split()[1] for caption in train.captions} == {kept}
    assert {sample.source for sample in epoch(train)} <= set(range(len(train.images)))
    states = len(set(validation.captions))
    (asked,) = validation.task().query_sets
    assert len(asked.sources) == len(validation.images) * (states - 1)          # as the test asks
    assert asked.excluded.tolist() == asked.sources.tolist()
    assert test.captions == MITStates(mitstates, "test").captions


def test_validation_takes_whole_products_out_of_fashion200k(tmp_path):
    colours, kinds = ("red", "blue", "grey"), ("dress", "skirt", "coat", "shirt")
    captions = [f"{colour} {kind}" for kind in kinds for colour in colours]
    root = write_fashion200k(tmp_path)
    (root / "labels/dress_train_detect_all.txt").write_text("".join(
        LABEL.format(image=f"women/{caption}/{number % 5}/{number}.jpeg".replace(" ", "_"), caption=caption)
        for number, caption in enumerate(captions * 4)))
    splits = [Fashion200k(root, split, held_out=0.5) for split in ("train", "validation")]
    products = [{image.split("/")[2] for image in split.images} for split in splits]
    assert all(products) and not products[0] & products[1] and len(products[0] | products[1]) == 5
    (asked,) = splits[1].task().query_sets
    assert len(asked.texts) == len(splits[1].images)
    for source, text, query in zip(asked.sources, asked.texts, splits[1].test_queries, strict=True):
        words = splits[1].captions[source].split(), splits[1].captions[query.target].split()
        (old,), (new,) = ([word for word in one if word not in other] for one, other in (words, words[::-1]))
        assert text == f"replace {old} with {new}"


def test_validation_takes_whole_sources_out_of_fashioniq(fashion_iq):
    train, validation = (FashionIQ(fashion_iq, split, held_out=0.5) for split in ("train", "validation"))
    asked = [(source, text) for queries in validation.task().query_sets
             for source, text in zip(queries.sources, queries.texts, strict=True)]
    assert len(asked) == len(validation.triplets) > 0 and len(train) > 0
    assert len(train) + len(asked) == len(FashionIQ(fashion_iq, "train"))
    sources = [{split.images[triplet.source] for triplet in split.triplets} for split in (train, validation)]
    assert not sources[0] & sources[1]
    with pytest.raises(InputError, match="no usable triplet of the validation split"):
        FashionIQ(fashion_iq, "validation", held_out=0)


def test_nothing_is_held_out_unless_asked_for(benchmark_tree):
    name, path = benchmark_tree
    whole = DATASETS[name](path, "train")
    assert whole.images == DATASETS[name](path, "train", held_out=0.0).images
    assert epoch(whole) == epoch(DATASETS[name](path, "train", held_out=0.0))


@pytest.mark.parametrize("renamed", ["all", "some"])
def test_mitstates_folders_may_have_a_stroke_for_the_space(mitstates, renamed):
    """The same images, captions, order and queries."""
    def seen(split):
        data = MITStates(mitstates, split)
        return data.captions, [image.replace("_", " ") for image in data.images], data.task().texts, data.dropped
    before = {split: seen(split) for split in ("train", "test")}
    for number, folder in enumerate(sorted((mitstates / "images").iterdir())):
        if renamed == "all" or number % 2:
            folder.rename(folder.with_name(folder.name.replace(" ", "_")))
    for name in ("__MACOSX", "_", "unspaced_", "_thumbs"):                      # no adjective, or no noun
        (mitstates / "images" / name).mkdir()
    after = {split: seen(split) for split in ("train", "test")}
    for split, (captions, images, texts, dropped) in before.items():
        assert after[split][:3] == (captions, images, texts)
        assert after[split][3] == dropped | {"folders of the system's own": 1}
