def report(folder, rows, asked):
    print(len(rows), "rows")
