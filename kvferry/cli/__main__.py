from kvferry.cli import main

main()
