"""What `build_data.py` takes from where: chosen by hand, picture by picture.

Cut-outs come from Tux Paint's stamps. Debian's copyright file and upstream's COPYING.txt put the
collection under the GPL, version 2 or later, but CHANGES.txt and CONTRIBUTORS.txt list pictures
with other terms; those are in `EXCLUDED`, and so is every picture whose origin is doubtful.
"""

from typing import NamedTuple

# Package → (kind of archive, version).
PACKAGES = {
    "tuxpaint-stamps-default": ("deb", "2022.06.04-1"),
    "lomiri-wallpapers-16.04": ("deb", "20.04.0-2"),
    "mate-backgrounds": ("deb", "1.26.0-1"),
    "scikit-image": ("whl", "0.26.0"),
    "scikit-learn": ("whl", "1.9.1"),
}

STAMPS = "usr/share/tuxpaint/stamps"
CHILDSPLAY = "Stas Zytkiewicz (Childsplay), adapted by Pere Pujal i Carabantes"
COLLINS = "Bill Kendrick, at Jen and Ed Collins's house"
FARM = "Bill Kendrick, at the Coco Ranch farmers' market"
FORD = "Caroline Ford"
GOERNER = "Chris Goerner"
GOVIA = "Justin Zeigler (GOVIA project)"
KENDRICK = "Bill Kendrick"
NOAA = "United States National Oceanic and Atmospheric Administration"
PUJAL = "Pere Pujal i Carabantes"
SULLIVAN = "John O'Sullivan"
UNNAMED = "contributors to Tux Paint"

# Class → rows of (author, folder, names). "hoofed" and "mammal" share out the land mammals.
_BY_CLASS = {
    "bird": [
        (KENDRICK, "animals/birds", "albino_peahen crowned_crane magellanic_penguin ostrich"),
        (KENDRICK, "animals/birds", "peacock pink_flamingo"),
        (GOERNER, "animals/birds", "adelaide-rosella little-penguin magpie rainbow-lorikeet"),
        (GOERNER, "animals/birds", "silver-gull"),
        (CHILDSPLAY, "animals/birds", "blackbird crow cuckoo duck gander lark nandou owl penguin"),
        (CHILDSPLAY, "animals/birds", "pigeon quetzal seagull tucan turkey vulture"),
        (f"{SULLIVAN}; {CHILDSPLAY}", "animals/birds", "hen rooster"),
        (SULLIVAN, "animals/birds", "drake guineafowl"),
        (FORD, "animals/birds", "chicken_profile"),
    ],
    "hoofed": [
        (CHILDSPLAY, "animals/mammals/bovines", "bison bull cow goat mountaingoat ram yak zebu"),
        (FORD, "animals/mammals/bovines", "cow_white sheep sheep_lamb"),
        (PUJAL, "animals/mammals/bovines", "gnu-baby gnu-baby-stand gnu-sitting gnu-stand"),
        (KENDRICK, "animals/mammals/bovines", "indian_blackbuck"),
        (CHILDSPLAY, "animals/mammals/camel", "camel dromedary"),
        (CHILDSPLAY, "animals/mammals/deer", "caribou deer doe wapiti"),
        (CHILDSPLAY, "animals/mammals/equines", "donkey horse"),
        (FORD, "animals/mammals/equines", "donkey_eating"),
        (f"{KENDRICK}; {CHILDSPLAY}", "animals/mammals/equines", "zebra"),
        (f"{KENDRICK}; {CHILDSPLAY}", "animals/mammals", "giraffe"),
        (CHILDSPLAY, "animals/mammals", "hippopotamus pig wildboar"),
        (FORD, "animals/mammals", "pig_golden pig_golden2"),
        (KENDRICK, "animals/mammals", "rhino_black"),
    ],
    "mammal": [
        (CHILDSPLAY, "animals/mammals/apes", "chimp gorilla"),
        (CHILDSPLAY, "animals/mammals/bears", "bear"),
        (PUJAL, "animals/mammals/bears", "european-bear"),
        (CHILDSPLAY, "animals/mammals/cats", "lion tiger"),
        (UNNAMED, "animals/mammals/cats", "lion-2"),
        (KENDRICK, "animals/mammals/cats", "tiger_sumatran"),
        (CHILDSPLAY, "animals/mammals/dogs", "dog fox"),
        (GOERNER, "animals/mammals/dogs", "dingo"),
        (CHILDSPLAY, "animals/mammals", "badger elephant ferret"),
        (FORD, "animals/mammals", "rabbit_little"),
        (CHILDSPLAY, "animals/mammals/rodents", "beaver marmot mouse rabbit rat squirrel"),
        (KENDRICK, "animals/mammals/rodents", "capybara"),
        (PUJAL, "animals/mammals/rodents", "rabbit-2"),
        (CHILDSPLAY, "animals/marsupials", "koala wombat"),
        (f"{GOERNER}; {CHILDSPLAY}", "animals/marsupials", "kangaroo"),
    ],
    "sea": [
        (SULLIVAN, "animals/fish", "bluegroper butterflyfish clownfish coraltrout dolphinfish"),
        (SULLIVAN, "animals/fish", "lionfish moonwrasse stripedfish"),
        (NOAA, "animals/fish", "lobster seahorse shrimp"),
        (CHILDSPLAY, "animals/mammals/aquatic", "dolphin orca sea_lion"),
        (GOERNER, "animals/shellfish", "abalone murray-mussel"),
    ],
    "food": [
        (FARM, "food/fruit", "apple_fuji apple_granny_smith apple_sierra_beauty"),
        (UNNAMED, "food/fruit", "avocado cherimoya kiwi orange_seville"),
        (KENDRICK, "food/fruit", "banana"),
        (GOERNER, "food/fruit", "lemon mandarine"),
        (COLLINS, "food/fruit", "mango pear pomegranate strawberry"),
        (UNNAMED, "plants/trees", "rambutan"),
        (KENDRICK, "food/nuts", "almond pecan"),
        (COLLINS, "food/nuts", "walnut"),
        (UNNAMED, "food/spices", "ginger"),
        ("Steve Karg", "food/vegetables", "broccoli corn"),
        (FARM, "food/vegetables", "chilepepper eggplant garlics pattypan_squash redlettuce"),
        (FARM, "food/vegetables", "yellowpepper"),
        (KENDRICK, "food/vegetables", "pumpkin_small"),
        (PUJAL, "plants/mushrooms", "cep cep-1 cep-2"),
    ],
    "flower": [
        (UNNAMED, "plants/flowers", "anemone_red"),
        (FORD, "plants/flowers", "daffodil"),
        ("Akkana Peck", "plants/flowers", "flower1 flower2 flower3 flower4 flower5 flower6"),
        ("Akkana Peck", "plants/flowers", "flower7 flower8 flower9 flower10"),
        (GOVIA, "plants/flowers", "iris marigold red-gazania rose whitestar-petunia"),
        (GOERNER, "plants/flowers", "pigface yellow-flower"),
    ],
    "household": [
        (KENDRICK, "hobbies", "binoculars camera_35mm"),
        (KENDRICK, "household/arttools", "pen_dryerase scissors_small_closed scissors_small_open"),
        (COLLINS, "household/dishes", "pitcher_small"),
        (FARM, "household/dishes", "teapot"),
        (COLLINS, "household/dishes/utensils", "nutcracker pepper_grinder"),
        (FARM, "household", "garbagecan"),
        (FORD, "household", "cylinder home_compost_bin"),
        ("Albert Cahalan", "household", "toilet"),
        (COLLINS, "household/tools", "hammer mallet_metal measuring_tape paintbrush_large plyers"),
        (COLLINS, "household/tools", "saw toolbox wrench wrench_adjustable wrench_plumbers"),
        (FORD, "household/tools", "spade"),
        (KENDRICK, "sports", "trophy_cup"),
        (KENDRICK, "town", "usps_mailbox"),
    ],
    "vehicle": [
        (GOVIA, "vehicles/auto", "sedan sportscar2 truck"),
        (PUJAL, "vehicles/construction", "dumper"),
        (FORD, "household/tools", "cementmixer"),
        ("Albert Cahalan", "vehicles/flight", "balloon360"),
        ("Albert Cahalan", "vehicles/flight/planes", "747"),
        (FORD, "vehicles", "garbagetruck"),
        ("Albert Cahalan", "vehicles/race", "indycar"),
        ("Jim Trice", "vehicles/ship", "chineseJunk walnutBoat"),
    ],
}
# Class → path of the stamp → author.
CUTOUTS = {
    kind: {f"{folder}/{name}": author for author, folder, names in rows for name in names.split()}
    for kind, rows in _BY_CLASS.items()
}

# Path of a stamp → what to keep of it, where specks lie at the rim.
CROPS = {
    "animals/fish/lobster": (0, 2, 411, 396),
    "vehicles/ship/chineseJunk": (0, 0, 160, 196),
}

# Why a photograph among the stamps is not here → names. (Drawings and weapons are not listed.)
EXCLUDED = {
    "CC-BY-SA": "pelican heron_greatblue heron_greatblue_flying inukshuk-photo adeenia anthoorium"
    " appooppanthady bolsom chemparathi chuvanna_plastic_poo australian_rules_football",
    "CC-BY-2.5": "firetruck",
    "GFDL": "helmeted_guineafowl Apricot_whole apricot Cherry_Stella Strawberry2 Woodlouse"
    " Brown_slug Lightbulb otter green_korean_bus mercurythermometer bandage_adhesive kettle"
    " wheelie_bin mug highlighter uk_post_box dead_end_sign give_way_sign roundabout school_sign"
    " no_entry_sign beetle pink_tricycle holly_leaves cymbal_crash drum_tomtom_floor drumkit cello"
    " guitar_classical guitar_electric guitar_electric_bass violin bassoon trumpet"
    " rugby_goal_posts",
    "taken from a stock or a lecturer's page": "grapes sliced_orange sliced_lime pineapple potato",
    "perhaps from a shop's page (CONTRIBUTORS.txt: some fruit and vegetables of"
    " MarketplaceFood.com)": "apple_green apple_red orange raspberry carrot garlic lettuce mushroom"
    " onion pepper tomato yam",
}


class Photo(NamedTuple):
    """A whole photograph and what is said about it."""

    name: str
    package: str
    path: str
    author: str
    licence: str
    caption: str
    split: str = ""
    box: tuple[int, int, int, int] | None = None


LOMIRI = "lomiri-wallpapers-16.04"
_LOMIRI = "usr/share/backgrounds"
_MATE = "usr/share/backgrounds/mate/nature"
_SKIMAGE = "skimage/data"
_SKLEARN = "sklearn/datasets/images"


def _lomiri(name, file, author, licence, caption, split="", box=None) -> Photo:
    return Photo(name, LOMIRI, f"{_LOMIRI}/{file}.jpg", author, licence, caption, split, box)


def _mate(name, author, caption, split) -> Photo:
    path = f"{_MATE}/{name}.jpg"
    return Photo(name.lower(), "mate-backgrounds", path, author, "GPL-2.0-or-later", caption, split)


def _skimage(name, author, licence, caption, split="") -> Photo:
    file = {"rocket": "rocket.jpg"}.get(name, f"{name}.png")
    return Photo(name, "scikit-image", f"{_SKIMAGE}/{file}", author, licence, caption, split)


AITZOL = "Aitzol Berasategi"
FREESPACE = 'Trevor "Freespace"'
CC_BY, CC0, PUBLIC = "CC-BY-4.0", "CC0-1.0", "public-domain"
_CHINA = ("scikit-learn", f"{_SKLEARN}/china.jpg", "danielbuechele", "CC-BY-2.0")

# Six crops each, of places and textures; only the living room has things of a cut-out's class in
# it, unlabelled (a bottle, a glass, a pepper mill). A photograph is in one split only.
BACKGROUNDS = [
    _lomiri("aitzgorri", "aitzgorri_by_Aitzol_Berasategi", AITZOL, CC_BY, "hills", "train"),
    _lomiri("life", "life_by_Aitzol_Berasategi", AITZOL, CC_BY, "brook", "train"),
    _lomiri("picos", "picosdeeuropa_by_Aitzol_Berasategi", AITZOL, CC_BY, "mountains", "test"),
    _lomiri("sunset", "sunset_by_Aitzol_Berasategi", AITZOL, CC_BY, "sunset", "train"),
    _lomiri("room", "Wine_by_Jakkub_Mede", "Jakub Mede", CC_BY, "living room", "train"),
    _mate("Aqua", "Charles Barbin", "drop of water", "train"),
    _mate("Blinds", "Lennart Poettering, Andrea Cimitan", "leaf", "train"),
    _mate("Dune", "Marco Cogoni, Hylke Bons", "dune grass", "test"),
    _mate("GreenMeadow", "Timothy Schellhase, Lapo Calamandrei", "blades of grass", "val"),
    _mate("RainDrops", "blackcombwhistler07", "wet leaves", "train"),
    _mate("Storm", "Sergey Nazarov", "storm over a road", "train"),
    _mate("Wood", "Jean-François Fortin Tam", "planks", "train"),
    _skimage("brick", "CC0 Textures", CC0, "bricks", "test"),
    _skimage("grass", "LinoLafett (DeviantArt)", CC0, "grass", "train"),
    _skimage("gravel", "CC0 Textures", CC0, "gravel", "train"),
    Photo("china", *_CHINA, "pagoda", "val"),
    _skimage("rocket", "SpaceX", PUBLIC, "launch pad at night", "test"),
]

PHOTOS = [
    _skimage("astronaut", "NASA", PUBLIC, "Eileen Collins in front of a model of the Shuttle"),
    _lomiri(
        "brushes", "Picture_1A_by_freespace", FREESPACE, CC_BY, "paint brushes after work"
    ),
    _skimage("chelsea", "Stéfan van der Walt", CC0, "Chelsea the cat"),
    _skimage("coffee", "Rachel Michetti", CC0, "a cup of coffee on a wooden table"),
    _lomiri("dandelions", "seeding_by_Clements_Engelhardt", "Clemens Engelhardt", CC0,
            "dandelions against the sun"),
    _lomiri("dogs", "friends_by_Aitzol_Berasategi", AITZOL, CC_BY, "two dogs look out of a window",
            box=(300, 450, 1800, 2100)),
    _lomiri("fig", "Picture_0B_by_freespace", FREESPACE, CC_BY, "half a fig in a red bowl"),
    Photo("flower", "scikit-learn", f"{_SKLEARN}/flower.jpg",
          "vultilion (danielbuechele in the README's text)", "CC-BY-2.0", "a dahlia"),
    Photo("pagoda", *_CHINA, "a pagoda above a lake"),
    _skimage("rocket", "SpaceX", PUBLIC, "a Falcon 9 before its launch"),
]  # fmt: skip
