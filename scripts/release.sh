#!/usr/bin/env bash
# Builds what a release uploads, in dist/, and checks it: the README as an index shows it, the version against the tag,
# and the wheel in a fresh environment, which trains, predicts and reports. Uploads nothing.
#   scripts/release.sh https://github.com/OWNER/NAME v0.1.0
set -euo pipefail
repository=$1 ref=$2
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

git archive HEAD | tar -x --one-top-level="$work/source"
python3 scripts/absolute_links.py "$work/source/README.md" "$repository" "$ref"
python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet build twine
rm -rf dist
"$work/tools/bin/python" -m build --outdir dist "$work/source"
"$work/tools/bin/twine" check --strict dist/*

python3 -m venv "$work/user"
"$work/user/bin/pip" install --quiet dist/*.whl
"$work/user/bin/pip" check
version=$("$work/user/bin/jaxlm" --version | cut -d ' ' -f 2)
if [[ $ref == v* && $ref != "v$version" ]]; then
    echo "error: the tag is $ref, but pyproject.toml has version $version; give both the same" >&2
    exit 1
fi
cd "$work"
XDG_CACHE_HOME=$work/cache "$work/user/bin/jaxlm" train --task mlm --train.max-steps 20 --train.eval-interval 10 --run.dir run
"$work/user/bin/jaxlm" predict --checkpoint run --text "A [MASK] of text."
"$work/user/bin/jaxlm" report run
