"""The command line: each verb parses, builds, calls — nothing else. Heavy imports wait inside the verbs."""

INPUT_ERROR = 2  # exit codes: the input cannot be used
INTERRUPTED = 130  # Ctrl-C or SIGTERM; what was done is saved
