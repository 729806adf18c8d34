"""Scripts: what to show, as shots in order, and the chunks in which each shot is shown.

Pure data (`shots.py`) plus parsing of YAML (`from_yaml.py`) and of the JSON Lines that LongLive and MemFlow use
(`from_lines.py`). It knows sizes only through Layout, and neither models nor vocabularies: any text is a prompt here.
"""

from slotmemory.script.files import MAX_BYTES, load_script, load_scripts
from slotmemory.script.from_yaml import parse_yaml
from slotmemory.script.shots import Schedule, Script, Shot, Switch
from slotmemory.script.values import MAX_PROMPT, MAX_SECONDS, MAX_SEED, MAX_SHOTS, MAX_TITLE, OPTIONS

__all__ = [
    "MAX_BYTES",
    "MAX_PROMPT",
    "MAX_SECONDS",
    "MAX_SEED",
    "MAX_SHOTS",
    "MAX_TITLE",
    "OPTIONS",
    "Schedule",
    "Script",
    "Shot",
    "Switch",
    "load_script",
    "load_scripts",
    "parse_yaml",
]
