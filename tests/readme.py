"""The shell blocks of README.md, by heading and number: BLOCKS["Uninstall", 0]."""

import re

from lab import EPOK

README = (EPOK.parent / "README.md").read_text()
BLOCKS = {
    (heading, number): block
    for heading, text in re.findall(r"(?ms)^##+ ([^\n]+)\n(.*?)(?=^##+ |\Z)", README)
    for number, block in enumerate(re.findall(r"(?ms)^```sh\n(.*?)^```$", text))
}
