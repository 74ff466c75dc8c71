"""The HTTP server: OpenAI's completions and chat over any `ServingEngine`, metrics, and a page that shows the gates.

`create_app` (in `app`) is the application, `run` (in `running`) serves it; both need the extra `serve`.
"""
