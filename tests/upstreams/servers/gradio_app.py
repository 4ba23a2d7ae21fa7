"""A Gradio app with the endpoints that the tests ask. Run with the Python of .venv-upstreams: gradio_app.py PORT"""

import sys
import time

import gradio as gr

THOUGHT = "<details class='thought'><summary>🧠 Thinking...</summary>Let me see.</details>\n\n"
DEBUG = "<details style='opacity:0.6;font-size:0.85em'><summary>🔍 Debug: Raw Response</summary>raw</details>"
LATENCY = "<div style='color:#666;border-top:1px solid #ddd'>Latency: 0.1 s</div>"


def answer(message, history, system, temperature, max_tokens):
    return f"You said {message!r} after {len(history)} turns; {system}; {temperature}; {max_tokens}."


def plain(message, history):
    """What gr.ChatInterface has people write: texts that grow."""
    text = ""
    for word in answer(message, history, None, None, None).split(" "):
        text += word + " "
        time.sleep(0.005)
        yield text


def bharatgen(message, history, system, temperature, max_tokens):
    """A conversation with thoughts, debug output and a latency, as BharatGen's app has it."""
    turns = [turn for pair in history for turn in zip(("user", "assistant"), pair)]
    earlier = [{"role": role, "content": text} for role, text in turns if text is not None]
    said = THOUGHT
    for word in answer(message, history, system, temperature, max_tokens).split(" "):
        said += word + " "
        yield [*earlier, {"role": "user", "content": message}, {"role": "assistant", "content": said}], ""
    said += DEBUG + LATENCY
    yield [*earlier, {"role": "user", "content": message}, {"role": "assistant", "content": said}], ""


def fails(message, history):
    yield "This much"
    raise gr.Error("No luck today", print_exception=False)


def slow(message, history):
    for number in range(2000):
        yield "x" * (number + 1)
        time.sleep(0.05)


with gr.Blocks() as app:
    message, system, done = gr.Textbox(), gr.Textbox(), gr.Textbox()
    history, out = gr.JSON(), gr.Textbox()
    temperature, max_tokens = gr.Number(), gr.Number()
    chat = gr.Chatbot()
    every = [message, history, system, temperature, max_tokens]
    button = gr.Button()
    button.click(bharatgen, every, [chat, done], api_name="chat_fn_1")
    button.click(plain, [message, history], out, api_name="turns")
    button.click(fails, [message, history], out, api_name="fails")
    button.click(slow, [message, history], out, api_name="slow", concurrency_limit=1)
    gr.ChatInterface(plain, api_name="chat")

app.queue(max_size=1, default_concurrency_limit=4)
app.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]), quiet=True, show_error=True)
