"""What a run takes of memory at the least, estimated before anything that takes long."""

import math
from argparse import Namespace

import torch
from torch import Tensor

from img_text_composition_models import MODELS, Recipe
from machine import distributed
from machine.device import check_room, free_memory
from machine.errors import InputError


def check_sizes(args: Namespace, device: torch.device) -> None:
    """Raise InputError where the model or a batch cannot be held, before anything that takes long: by what they take at
    the least, in fact it is more."""
    images = 2 * args.batch_size // args.accumulate // distributed.world()
    numbers = 3 * images * args.image_size**2 + (args.image_embed_dim + args.text_embed_dim)**2
    if 4000 * numbers < free_memory(device):                                    # no encoder keeps a thousand times that
        return
    recipe = Recipe(args.model, args.image_encoder, args.image_size, args.image_embed_dim,
                    args.text_encoder if MODELS[args.model].frozen else "lstm", args.text_embed_dim, {},
                    args.image_features, args.learn_words, args.prompt)
    weights, of_image = sizes_of(recipe, not args.test_only, args.freeze_image_encoder)
    copies = distributed.local_world() if device.type == "cpu" else 1           # a GPU has one process
    check_room(copies * weights, f"a model of --image_embed_dim {args.image_embed_dim}, --text_embed_dim "
               f"{args.text_embed_dim} and --image_size {args.image_size}", "lower what is large", device)
    if not args.test_only:
        rounded = 0.5 if args.precision == "bf16" else 1                        # of what is kept of them
        check_room(copies * (weights + rounded * images * of_image), f"training on --batch_size "
                   f"{args.batch_size} images of --image_size {args.image_size}, each with its target,",
                   "lower one of them, or share the batch with --accumulate", device)


def check_test_size(args: Namespace, images: int, device: torch.device) -> None:
    """The same of the pixels of a test's batch, which has no more than the `images` that there are."""
    images = min(args.test_batch_size or 1, images)
    each = 5 * 3 * args.image_size**2                                           # uint8, then float32
    check_room(images * each, f"a test on --test_batch_size {args.test_batch_size} images of "
               f"--image_size {args.image_size}", "lower one of them", device)


def sizes_of(recipe: Recipe, training: bool, frozen: bool = False) -> tuple[float, float]:
    """Bytes of a model's weights, with gradient and momentum of those that learn if it trains, and of what it keeps of
    each image that it encodes, for the way back if it trains; neither is made to find out. Infinite where they are more
    than can be counted. frozen: so that in training it is given the image encoder's features, and keeps little."""
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()    # held: so that no other has its number
        return tensor
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            model = recipe.build(lambda texts: torch.zeros(len(texts), recipe.text_dim))
            images, encode = torch.zeros(2, 3, recipe.image_size, recipe.image_size), model.img_model
            if training and frozen:                                             # 2: batch norm's least
                model.freeze_backbone()
                images, encode = torch.zeros(2, model.traits.width), model.last_layer
            with torch.set_grad_enabled(training), torch.autograd.graph.saved_tensors_hooks(keep, lambda it: it):
                features = encode(images)                                   # held, and with it all that it keeps
    except (InputError, RuntimeError, OverflowError) as error:                  # others: where it is truly built
        return (math.inf, math.inf) if "overflow" in str(error) else (0, 0)
    weights = [*model.parameters(), *model.buffers()]
    for weight in weights:
        kept.pop(weight.untyped_storage()._cdata, None)
    of_images = sum(storage.nbytes() for storage in kept.values()) + (images.nbytes + features.nbytes)
    learn = sum(weight.nbytes for weight in model.parameters() if training and weight.requires_grad)
    return sum(weight.nbytes for weight in weights) + 2 * learn, of_images / 2
