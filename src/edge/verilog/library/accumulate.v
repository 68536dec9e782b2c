// Adds up the bit-planes of a pixel, most significant first: the sum doubles at each beat. At the last beat the sum is
// handed over, and the next begins at zero.
module accumulate #(
  parameter WIDTH = 9
) (
  input wire clk,
  input wire rst,
  input wire valid,
  input wire last,
  input wire [WIDTH-1:0] count,
  output reg [WIDTH-1:0] sum
);
  reg [WIDTH-1:0] so_far;
  wire [WIDTH-1:0] now = (so_far << 1) + count;
  always @(posedge clk) begin
    if (rst | (valid & last)) so_far <= 0;
    else if (valid) so_far <= now;
    if (valid & last) sum <= now;
  end
endmodule
