"""Management commands of the stock app, in the folder where Django looks for them."""
