#!/bin/bash
# Installs the clients of tests/clients, at pinned versions: npm and PyPI, 2.3 GB, nothing else on the machine changes.
#
#     tests/clients/install.sh [FOLDER]      default: $KVERN_CLIENTS, else ~/.cache/kvern/clients
#
# FOLDER/bin then holds one command each. Needs npm, node 20 or later and Python 3.11 or later.
set -euo pipefail

npm_packages=(
  @anthropic-ai/claude-code@2.1.328
  @openai/codex@0.169.0
  opencode-ai@1.18.33
  @continuedev/cli@1.5.47
)
aider=(
  aider-chat==0.86.2
)
shell_gpt=(
  click==8.5.1
  shell-gpt==1.5.1
)
sdks=(
  anthropic==2.13.0
  langchain-openai==1.7.4
  llm==0.35
  openai==3.57.0
)

folder=${1:-${KVERN_CLIENTS:-$HOME/.cache/kvern/clients}}
mkdir -p "$folder/npm" "$folder/bin"
folder=$(cd "$folder" && pwd)

# Scripts of packages do not run: they would fetch from elsewhere what the packages for this platform already hold.
npm install --prefix "$folder/npm" --ignore-scripts --no-audit --no-fund --save-exact "${npm_packages[@]}"

environment() {
  [ -x "$folder/$1/bin/python" ] || python3 -m venv "$folder/$1"
  "$folder/$1/bin/pip" install --quiet "${@:2}"
}
environment aider "${aider[@]}" # they disagree about what they need, so each has an environment of its own
environment shell-gpt "${shell_gpt[@]}"
environment sdks "${sdks[@]}"

link() { ln -sfn "$2" "$folder/bin/$1"; }
case $(uname -s)-$(uname -m) in
  Linux-x86_64) platform=linux-x64 ;;
  Linux-aarch64) platform=linux-arm64 ;;
  Darwin-arm64) platform=darwin-arm64 ;;
  *) echo "no clients are packaged for this machine" >&2 && exit 1 ;;
esac
modules=$folder/npm/node_modules
link claude "$modules/@anthropic-ai/claude-code-$platform/claude"
link codex "$modules/.bin/codex"
link opencode "$modules/opencode-$platform/bin/opencode"
link cn "$modules/.bin/cn"
link aider "$folder/aider/bin/aider"
link sgpt "$folder/shell-gpt/bin/sgpt"
link llm "$folder/sdks/bin/llm"
# Not a link: through one, Python would not find its environment.
printf '#!/bin/sh\nexec "%s" "$@"\n' "$folder/sdks/bin/python" >"$folder/bin/python" && chmod +x "$folder/bin/python"
echo "installed in $folder"
