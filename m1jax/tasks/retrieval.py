"""Retrieval of a needle: one value out of a long list of names and values."""

import itertools
import random

from m1jax.tasks.task import Instance, Solution, Task

COLOURS = (
    "red", "blue", "green", "white", "black", "pink", "gray", "brown", "gold", "teal", "plum", "rose",
    "mint", "rust", "sand", "ruby", "lime", "navy", "coral", "peach", "amber", "ivory", "lilac", "olive",
)  # fmt: skip
THINGS = (
    "ant", "ape", "apple", "arm", "axe", "bag", "ball", "bat", "bean", "bear", "bed", "bee", "bell", "belt", "bird",
    "boat", "bolt", "bone", "book", "boot", "bowl", "box", "broom", "brush", "bus", "cake", "calf", "camel", "camp",
    "canoe", "cap", "card", "carrot", "cart", "cat", "cave", "chair", "chalk", "cheese", "clock", "cloud", "coat",
    "coin", "corn", "couch", "cow", "crab", "crane", "crow", "cup", "deer", "desk", "dish", "dog", "doll", "door",
    "dove", "drum", "duck", "eagle", "ear", "egg", "elf", "fan", "farm", "fence", "fig", "fish", "flag", "flute",
    "foot", "fork", "fox", "frog", "gate", "gem", "ghost", "goat", "goose", "grape", "guitar", "hammer", "hand",
    "harp", "hat", "hawk", "hen", "hill", "hook", "horn", "horse", "hose", "house", "ice", "jar", "jet", "jug",
    "kettle", "key", "king", "kite", "knee", "knife", "ladder", "lake", "lamb", "lamp", "leaf", "lemon", "lid",
    "lily", "lion", "lock", "log", "map", "mask", "melon", "milk", "mill", "moon", "moth", "mouse", "mug", "nail",
    "needle", "nest", "net", "nose", "nut", "oak", "oar", "onion", "owl", "ox", "paddle", "pan", "pear", "pen",
    "piano", "pie", "pig", "pillow", "pin", "pipe", "plate", "pond", "pot", "quilt", "rabbit", "radio", "rain", "rat",
    "ring", "river", "road", "robot", "roof", "root", "rope", "rug", "sail", "salt", "saw", "scarf", "seal", "seed",
    "ship", "shoe", "skirt", "sled", "snail", "snow", "soap", "sock", "sofa", "spoon", "star", "stem", "stone",
    "stove", "sun", "swan", "table", "tail", "tank", "tent", "tiger", "toad", "towel", "toy", "train", "tray", "tree",
    "truck", "tub", "vase", "vest", "wagon", "wall", "wasp", "web", "wheel", "whale", "window", "wolf", "yak", "yarn",
    "zebra",
)  # fmt: skip
# Where the things do not suffice: a cup of each colour.
_MORE = tuple(f"{colour} {thing}" for colour, thing in itertools.product(COLOURS, THINGS))


def named_colours(rng: random.Random, count: int) -> dict[str, str]:
    """So many different names, each with a colour."""
    names = THINGS if count <= len(THINGS) else THINGS + _MORE
    return {name: rng.choice(COLOURS) for name in rng.sample(names, count)}


def _draw(rng: random.Random, difficulty: int) -> Instance:
    colours = named_colours(rng, difficulty + 1)
    return {"items": tuple(f"{name}={value}" for name, value in colours.items()), "name": rng.choice(list(colours))}


def _solve(instance: Instance) -> Solution:
    found = next(item for item in instance["items"] if item.startswith(f"{instance['name']}="))
    return Solution(f"Found: {found}", found.partition("=")[2])


RETRIEVAL = Task(
    name="retrieval",
    difficulty=15,  # one less than the items of the list
    hardest=len(THINGS + _MORE) - 1,
    draw=_draw,
    phrasings=(
        "Given {items}. What is {name}?",
        "Remember {items}. What is the value of {name}?",
        "Here is a list: {items}. Find {name}.",
    ),
    solve=_solve,
)
