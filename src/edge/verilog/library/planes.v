// From whole pixels of WIDTH channels with BITS bits each to bit-planes, most significant first.
module planes #(
  parameter WIDTH = 1,
  parameter BITS = 4
) (
  input wire clk,
  input wire rst,
  input wire [WIDTH*BITS-1:0] in_data,
  input wire in_valid,
  output wire in_ready,
  output wire [WIDTH-1:0] out_data,
  output wire out_valid,
  input wire out_ready
);
  localparam BB = $clog2(BITS + 1);
  reg [BB-1:0] left;  // bits of the pixel that are still to be sent
  assign out_valid = left != 0;
  assign in_ready = left == 0 || (left == 1 && out_ready);
  genvar i;
  generate
    for (i = 0; i < WIDTH; i = i + 1) begin : channel
      reg [BITS-1:0] word;
      always @(posedge clk)
        if (in_valid & in_ready) word <= in_data[BITS*i +: BITS];
        else if (out_ready) word <= word << 1;
      assign out_data[i] = word[BITS-1];
    end
  endgenerate
  always @(posedge clk)
    if (rst) left <= 0;
    else if (in_valid & in_ready) left <= BITS;
    else if (out_valid & out_ready) left <= left - 1'b1;
endmodule
