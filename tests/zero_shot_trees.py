"""Small trees in the published forms of CIRCO, GeneCIS, ImageNet-R, Shoes and LaSCo, made up."""

import json

from .conftest import picture


def write_json(root, files):
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(json.dumps(content))
    return root


CIRCO_IDS = [100 * number + 7 for number in range(12)]      # of image 0, 1, ...
CIRCO_VAL = [  # reference, target, right ones, aspects; by number
    (0, 2, [2, 5, 9], ["addition", "negation"]), (3, 4, [4], ["negation"]), (6, 8, [8, 1], [])]
# References; words that `trained` knows, as a search leaves out others.
CIRCO_TEST = [(0, "old bus"), (3, "wet"), (3, "white dog"), (11, "wet dog")]


def write_circo(root, pictures=True):
    val = [{"reference_img_id": CIRCO_IDS[source], "target_img_id": CIRCO_IDS[target], "shared_concept": "a dog",
            "relative_caption": f"old {number}", "gt_img_ids": [CIRCO_IDS[image] for image in right], "id": number,
            "semantic_aspects": aspects} for number, (source, target, right, aspects) in enumerate(CIRCO_VAL)]
    test = [{"reference_img_id": CIRCO_IDS[source], "relative_caption": text, "shared_concept": "a bus", "id": number}
            for number, (source, text) in enumerate(CIRCO_TEST)]
    names = [f"{image:012d}.jpg" for image in CIRCO_IDS]
    info = {"info": {}, "licenses": [], "images": [
        {"license": 1, "file_name": name, "height": 36, "width": 40, "id": image}
        for name, image in zip(names, CIRCO_IDS, strict=True)]}
    for name in names if pictures else ():
        picture(root / "COCO2017_unlabeled" / "unlabeled2017" / name)
    return write_json(root, {"annotations/val.json": val, "annotations/test.json": test,
                             "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json": info})


def coco(number):
    return {"val_image_id": number}


def genome(number, *box):
    return {"image_id": number, "instance_bbox": list(box)}


GENECIS = {  # condition, reference, target, gallery
    "focus_object": [("bus", coco(1), coco(2), [coco(3), coco(4)]), ("dog", coco(2), coco(4), [coco(4), coco(5)])],
    "change_object": [("two dogs", coco(3), coco(5), [coco(1), coco(2), coco(4)])],
    "focus_attribute": [("color", genome(61, 4, 5, 10, 8), genome(61, 20, 10, 6, 6), [genome(62, 0, 0, 12, 30)])],
    "change_attribute": [("wet", genome(62, 8, 8, 8, 8), genome(63, 3, 3, 20, 20),
                          [genome(61, 4, 5, 10, 8), genome(61, 4, 5, 10, 9)])]}


def write_genecis(root, tasks=GENECIS):
    for number in range(1, 6):
        picture(root / "val2017" / f"{number:012d}.jpg")
    for number in (61, 62, 63):
        picture(root / "VG_100K_all" / f"{number}.jpg")
    return write_json(root, {f"genecis/{task}.json": [
        dict(zip(("condition", "reference", "target", "gallery"), query, strict=True)) for query in queries]
        for task, queries in tasks.items()})


PHOTOS = [("n01/ILSVRC2012_val_00000003", 2), ("n01/ILSVRC2012_val_00000001", 2), ("n02/ILSVRC2012_val_00000002", 5)]
DRAWN = [("n01/cartoon_0", 2), ("n01/cartoon_1", 2), ("n02/toy_0", 2005), ("n01/toy_0", 2002), ("n01/toy_1", 2002)]


def write_imagenet_r(root):
    """Class 2 has two photographs, two cartoons and two toys; class 5 a photograph and a toy."""
    folder = root / "imgnet"
    lines = {"imgnet_real_query.txt": [f"imgnet/real/{name}.JPEG {label} " for name, label in PHOTOS],
             "imgnet_targets.txt": [*(f"imgnet/imagenet-r/{name}.jpg {label} " for name, label in DRAWN),
                                    *(f"imgnet/real/{name}.JPEG {6000 + label} " for name, label in PHOTOS)]}
    for name, of_file in lines.items():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("".join(f"{line}\n" for line in of_file))
        for line in of_file:
            picture(root / line.split()[0])
    return folder


SHOES = {"train": [f"img_womens_{name}.jpg" for name in ("boots_1", "boots_2", "clogs_3")],
         "eval": [f"img_womens_{name}.jpg" for name in ("clogs_4", "flats_5", "flats_6", "flats_7")]}
SHOE_PAIRS = [("boots_1", "boots_2", "has a heel"), ("boots_2", "boots_2", "is it"), ("boots_2", "clogs_3", "is red "),
              ("clogs_4", "flats_5", "is flat"), ("flats_6", "flats_6", "is it"), ("flats_5", "flats_7", "is wet")]


def write_shoes(root):
    for number, name in enumerate(name for names in SHOES.values() for name in names):
        picture(root / f"womens_{name.split('_')[2]}" / str(number % 2) / name)
    entries = [{"ImageName": f"img_womens_{target}.jpg", "ReferenceImageName": f"img_womens_{source}.jpg",
                "RelativeCaption": text} for source, target, text in SHOE_PAIRS]
    for split, names in SHOES.items():
        (root / f"{split}_im_names.txt").write_text("".join(f"{name}\n" for name in names))
    return write_json(root, {"relative_captions_shoes.json": entries})


def write_lasco(root):
    """Of val, images 1 to 6; of train, 11 to 13."""
    def named(number, split="val"):
        return [number, f"{split}2014/COCO_{split}2014_{number:012d}.jpg"]
    val = [{"qid": 28000, "query-image": named(1), "query-text": "The dog is wet", "target-image": named(4)},
           {"qid": 29000, "query-image": named(3), "query-text": "A bus", "target-image": named(1)}]
    train = [{"qid": number, "query-image": named(number, "train"), "query-text": f"Old {number}",
              "target-image": named(number + 1, "train")} for number in (11, 12)]
    corpus = [{"id": number, "path": f"val/{named(number)[1]}"} for number in range(1, 7)]
    for _, path in [*(named(number) for number in range(1, 7)), *(named(number, "train") for number in range(11, 14))]:
        picture(root / "coco" / path)
    return write_json(root, {"lasco_val.json": val, "lasco_train.json": train, "lasco_val_corpus.json": corpus})


TREES = {"circo": write_circo, "genecis": write_genecis, "imagenet_r": write_imagenet_r, "shoes": write_shoes,
         "lasco": write_lasco}
