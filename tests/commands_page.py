"""docs/commands.md: every command with all of its options, as ``--help`` tells them.

    python -m tests.commands_page > docs/commands.md

writes the page anew after a change of a command or of a settings class. A test holds it.
"""

from __future__ import annotations

import re
import sys

HEAD = """# Commands

What `mistill COMMAND --help` tells, of every command on one page. The guides say when to change
which option: [tuning](tuning.md), [preferences](preferences.md), [distilling](distilling.md),
[quantizing](quantizing.md), [exporting](exporting.md), [chatting](chatting.md),
[serving](serving.md), [reports](reports.md).
`python -m tests.commands_page > docs/commands.md` writes this page.
"""


def page() -> str:
    """The page as it should be."""
    from mistill.cli.app import app

    text = app.generate_docs(output_format="markdown", usage_name="mistill")
    # The usage repeats how this very program was started.
    text = re.sub(r"^(mistill .*?) -m [\w.]+", r"\1", text, flags=re.MULTILINE)
    text = text.replace(" *[default: ()]*", "").replace(" *[default: None]*", "")
    # The name of a heading keeps the dashes that an entry begins with.
    text = re.sub(r"(\[`--[^`]+`\]\(#mistill-)", r"\1--", text)
    return f"{HEAD}\n{text[text.index('**Commands**') :].rstrip()}\n"


if __name__ == "__main__":
    sys.stdout.write(page())
