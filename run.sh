#!/usr/bin/env bash
# Segment a case, setting up what is missing. Without arguments: the sample case. With arguments: those of `process.py run`.
#   ./run.sh
#   ./run.sh --dwi dwi.nii.gz --adc adc.nii.gz [--flair flair.nii.gz] --out results/
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
source "$here/venv.sh"
(cd "$here" && need_venv run)
if [ $# -eq 0 ]; then
    images=$here/test/sample/input/images
    set -- --dwi "$images"/dwi-brain-mri/*.mha --adc "$images"/adc-brain-mri/*.mha --flair "$images"/flair-brain-mri/*.mha --out "$here/out/sample"
fi
exec "$here/.venv/bin/python" "$here/process.py" run "$@"
