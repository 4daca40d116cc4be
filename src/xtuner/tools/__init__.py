"""Tools that a model may call: what they are, how they run, and the loop of calls and results.

    my_tools.py, built-in names, MCP servers ──► ToolBox ──schemas──► prompt
    answer ──parser──► call ──confirmed?──► ToolBox.call, in another process, within a time limit
           ◄──────────── result or error, as a turn of the tool ◄──┘       at most k rounds

Used by `chat`, the web page and `serve`.
"""
