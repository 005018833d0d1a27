"""Files that learners hand in, or somebody who would rather not learn: name → a script's text.

What is right or wrong is `entropy` of chapter 01; the tests add a right `causal_mask` to each, the
answers to the visible cases (ANSWERS), and the path of a neighbour's file (NEIGHBOUR).
"""

RIGHT = """
def entropy(weights):
    return torch.special.entr(weights).sum(dim=-1)
"""
SECRET = "the neighbour's answer, nobody else's"

HARMLESS = {
    "right": RIGHT,
    "=1+1": RIGHT,
    "neighbour": f"{RIGHT}# {SECRET}",
    "exits above": f"import os\nos._exit(0)\nraise SystemExit\n{RIGHT}",
    "prints 50 MB": """
def entropy(weights):
    print("x" * 50_000_000)
    return torch.special.entr(weights).sum(dim=-1)
""",
}

CARELESS = {
    "no entropy": "",
    "number": "entropy = 3",
    "no parameters": "def entropy(): return 1",
    "syntax": "def entropy(weights:\n    return 1",
    "raises": "def entropy(weights):\n    return weights.nothing",
    "in place": "def entropy(weights):\n    weights += 1",
    "endless loop": "def entropy(weights):\n    while True: pass",
    "endless loop above": """
def endless():
    while True: pass
entropy = endless()
""",
    "recursion": "def entropy(weights):\n    return entropy(weights)",
    "memory": """
def entropy(weights):
    kept = []
    while True: kept.append(torch.ones(2**26))
""",
    "returns 50 MB": """
def entropy(weights):
    return torch.ones(50_000_000, dtype=torch.uint8)
""",
    "returns itself": """
def entropy(weights):
    a = []
    a += [a, a, a]
    return a
""",
}

HOSTILE = {
    "exits": "import os\ndef entropy(weights):\n    os._exit(0)",
    "kills": """
import os
def entropy(weights):
    for process in (0, -1, 1, os.getppid()):
        os.kill(process, 9)
""",
    "fork bomb": "import os\ndef entropy(weights):\n    while True: os.fork()",
    "thread bomb": """
from threading import Thread
def entropy(weights):
    while True: Thread(target=entropy, args=(weights,)).start()
""",
    "shared memory": """
import mmap
def entropy(weights):
    kept = []
    while True: kept.append(mmap.mmap(-1, 2**28))
""",
    "fills the disk": """
def entropy(weights):
    for number in range(10**6):
        open(f"{number}", "wb").write(bytes(2**23))
""",
    "visible seed": """
def entropy(weights):
    return torch.tensor(ANSWERS.get(weights.sum().item(), 0), dtype=weights.dtype)
""",
    "reads": "def entropy(weights):\n    return open(NEIGHBOUR).read()",
    "searches": """
import os
def entropy(weights):
    for folder, _, files in os.walk("/"):
        for name in files:
            if name.startswith(("neighbour", "ch01")):
                return open(os.path.join(folder, name)).read()
""",
    "borrows": """
def entropy(weights):
    from attnlab.lab.exercises.ch01 import entropy as theirs
    return theirs(weights)
""",
    "asks lab.solution": """
from attnlab import lab
def entropy(weights):
    scope = {"torch": torch}
    exec(lab.solution("attention.entropy").text, scope)
    return scope["entropy"](weights)
""",
    "overwrites": """
from attnlab import lab
import attnlab.lab.exercises.framework as framework
def entropy(weights):
    lab.check = framework.judge = lambda *a: "correct"
    framework.difference = lambda *a: None
    torch.isclose = lambda a, *b: a == a
    torch.Tensor.__eq__ = lambda a, b: True
    return weights
""",
    "forges": """
import os, struct
def entropy(weights):
    text = b'"correct"'
    for descriptor in range(64):
        try: os.write(descriptor, struct.pack("!II", len(text), 0) + text)
        except OSError: pass
""",
}
