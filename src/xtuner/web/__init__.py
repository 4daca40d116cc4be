"""The web page: chat, train and look at runs. Needs gradio (extra `web`).

page ──► chat tab   ──► ModelPool, Conversation ──► serve.engine
    ├──► train tab  ──► form of the schema, forecast, data report ──► a process of its own
    └──► runs tab   ──► runs.folder, runs.report
"""
