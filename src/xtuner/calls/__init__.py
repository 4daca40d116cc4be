"""Tool calls: one representation of tools and calls, checks, and the text that models write.

    any data format ──read──► Message.tool_calls ──check──► problems
                                     │   ▲
                              render ▼   │ parse        families/, one row per model family
                              text that a model writes

A tool is ``{"type": "function", "function": {"name", "description", "parameters"}}`` with a JSON
schema of its parameters; a call is ``{"id", "type": "function", "function": {"name",
"arguments"}}``, whose arguments are an object, or text if they are not valid JSON.
"""
