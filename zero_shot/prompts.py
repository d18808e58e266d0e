"""The sentence that a query's text is put into before the text tower reads it. Nothing here loads torch.

In a prompt {} stands for the text, and $ for the word that the picture becomes; composers without such a word leave
the $ out.
"""

import re

UNTRAINED = ("image", "text", "sum", "product", "BASIC")                        # the composers that learn nothing
PICTURE = "$"                           # id 259 of CLIP's vocabulary, which a text that is cleaned does not have
BARE = f"a photo of {PICTURE}"          # where there is no text
PROMPTS = {                             # as published, by name
    "text": "{}",                                                               # the text as it is
    "photo": "a photo of {}",                                                   # CLIP, arXiv 2103.00020
    "lincir": f"{BARE} that {{}}",                                              # arXiv 2312.01998
    "pic2word": f"{BARE} , {{}}",                                               # arXiv 2302.03084: CIRR, FashionIQ
    "pic2word_domain": f"a {{}} of {PICTURE}",                                  # ImageNet-R
    "pic2word_objects": f"{BARE} and {{}}",                                     # COCO
}


def template_of(prompt: str, own: str) -> str:
    """A prompt by its published name, or as it is; `own` for 'auto'. Raises ValueError for what has no {}."""
    template = PROMPTS.get(own if prompt == "auto" else prompt, prompt)
    if template.count("{}") != 1:
        raise ValueError(f"{prompt!r}: give one of {', '.join(PROMPTS)}, or a text of your own in which one {{}} "
                         "stands for the query's text")
    return template


def cleaned(text: str) -> str:
    """Without the two characters that the originals take for the picture's word, and without what CLIP's tokenizers
    take for a row's start and end, wherever a text has them; white space is one space."""
    return " ".join(re.sub(r"[$*]|<(start|end)_of_text>", " ", text, flags=re.IGNORECASE).split())


def with_word(template: str, text: str) -> str:
    """The template with a text in its place, in which only its own $ are the picture's word; without a text, BARE."""
    text = cleaned(text)
    return template.replace("{}", text) if text else BARE


def without_word(template: str, text: str) -> str:
    """The template with a text in its place, for a tower that reads no picture's word."""
    return " ".join(template.replace(PICTURE, " ").split()).replace("{}", text)
