"""Draw the pictures that come with the package, csp_edge/pictures.

python tools/demo_vlm/pictures.py
"""

import json
from pathlib import Path

from csp_edge.eval.scenes import Scene, Thing, draw

OUT = Path(__file__).parents[2] / "csp_edge" / "pictures"

CAT, DOG, ROCKET, HOUSE = Thing("cat"), Thing("dog"), Thing("rocket"), Thing("house")
APPLE, PIZZA, KEY, FISH = Thing("apple"), Thing("pizza"), Thing("key"), Thing("fish")

SCENES = [
    Scene({1: CAT, 6: Thing("circle", "red")}),
    Scene({3: Thing("heart", "pink"), 7: Thing("star", "blue")}),
    Scene({0: Thing("cross", "green"), 4: Thing("square", "orange"), 8: Thing("ring", "purple")}),
    Scene({0: Thing("banana"), 1: Thing("crown")}, (2, "MILK")),
    Scene({3: DOG, 4: Thing("triangle", "green"), 5: Thing("ball")}),
    Scene({0: FISH, 2: FISH, 4: FISH, 6: Thing("boat"), 8: FISH}),
    Scene({0: ROCKET, 7: HOUSE}),
    Scene({4: ROCKET, 7: HOUSE}),
    Scene({2: ROCKET, 7: HOUSE}),
    Scene({1: KEY, 3: APPLE, 5: Thing("diamond", "yellow")}),
    Scene({1: KEY, 3: PIZZA, 5: Thing("diamond", "yellow")}),
    Scene({6: Thing("bus"), 7: Thing("tree"), 8: Thing("umbrella")}, (0, "427")),
]


def main() -> None:
    contents = {}
    for i, scene in enumerate(SCENES, 1):
        name = f"scene{i:02}.png"
        draw(scene, (i,), "noto").save(OUT / name, optimize=True)
        contents[name] = [str(thing) for thing in scene.things.values()]
    (OUT / "contents.json").write_text(json.dumps(contents, indent=1) + "\n")


if __name__ == "__main__":
    main()
