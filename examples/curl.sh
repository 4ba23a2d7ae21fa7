#!/usr/bin/env bash
# The API with nothing but curl: the models, a completion, a streamed chat.
set -euo pipefail

base=${OPENAI_BASE_URL:-http://127.0.0.1:8000/v1}
api() {
    curl --silent --show-error --fail-with-body --no-buffer \
        -H "Authorization: Bearer ${OPENAI_API_KEY:-none}" -H 'Content-Type: application/json' "$@"
    echo
}

echo '# models'
api "$base/models"

echo '# a completion'
api "$base/completions" -d '{"prompt": "ROMEO:\n", "max_tokens": 100, "temperature": 0.8, "seed": 1}'

echo '# a chat, streamed'
api "$base/chat/completions" -d '{"messages": [{"role": "user", "content": "Speak."}], "max_tokens": 20, "stream": true}'
