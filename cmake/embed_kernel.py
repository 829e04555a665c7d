"""One text of a GPU's kernel and the headers that it includes: at run time, no header can be found.

python embed_kernel.py OUT.h FILE...    writes the text as a C++ string, `gate_source`
"""

import re
import sys
from collections.abc import Sequence
from pathlib import Path


def amalgamate(files: Sequence[Path]) -> str:
    """The files in order, without their includes of each other; #line directives keep messages readable."""
    parts = []
    for file in files:
        text = re.sub(r'^#(pragma once|include ".*")$', "", file.read_text(), flags=re.MULTILINE)
        parts.append(f'#line 1 "{file.name}"\n{text}')
    return "".join(parts)


def main() -> None:
    out, *files = map(Path, sys.argv[1:])
    text = amalgamate(files)
    text.encode("ascii")  # MLX hands it to the GPU's compiler as such
    out.write_text(f'#pragma once\n\ninline constexpr const char* gate_source = R"kernel({text})kernel";\n')


if __name__ == "__main__":
    main()
