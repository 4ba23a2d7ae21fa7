"""The official client: the models, a completion, a streamed chat."""

from __future__ import annotations

import os

from openai import OpenAI


def main() -> None:
    with OpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    ) as client:
        model = client.models.list().data[0].id
        print(f"# model: {model}")

        completion = client.completions.create(model=model, prompt="ROMEO:\n", max_tokens=100, temperature=0.8, seed=1)
        print(f"# a completion\n{completion.choices[0].text}\n# {completion.usage}")

        print("# a chat, streamed")
        with client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "Speak."}], max_tokens=100, stream=True
        ) as stream:
            for chunk in stream:
                for choice in chunk.choices:
                    print(choice.delta.content or "", end="", flush=True)
        print()


if __name__ == "__main__":
    main()
